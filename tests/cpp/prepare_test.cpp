// What a layer does to its input itself: RMS norm and gated SiLU.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "grinqh/core.h"

namespace grinqh {
namespace {

std::vector<float> random_values(std::int64_t count) {
  std::mt19937 generator(static_cast<unsigned>(count));
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

class PrepareOfWidth : public testing::TestWithParam<std::int64_t> {};

TEST_P(PrepareOfWidth, NormIsThatOfDoublePrecision) {
  const std::int64_t k = GetParam(), stride = k + 3;
  const std::vector<float> x = random_values(2 * stride), weight = random_values(k);
  std::vector<float> out(static_cast<std::size_t>(2 * k), NAN);
  PrepareParams params{x.data(), 2, k, stride, Dtype::f32, {weight.data(), 1e-5f, false}, out.data()};
  ASSERT_TRUE(prepare(params, {}).ok());
  for (std::int64_t row = 0; row < 2; ++row) {
    double sum = 0;
    for (std::int64_t j = 0; j < k; ++j) sum += std::pow(static_cast<double>(x[row * stride + j]), 2);
    const double factor = 1 / std::sqrt(sum / static_cast<double>(k) + 1e-5);
    for (std::int64_t j = 0; j < k; ++j) {
      const double wanted = static_cast<double>(x[row * stride + j]) * factor * static_cast<double>(weight[j]);
      EXPECT_NEAR(out[row * k + j], wanted, 1e-5 * std::abs(wanted) + 1e-7);
    }
  }
}

TEST_P(PrepareOfWidth, GateIsSiluOfTheFirstHalfTimesTheSecond) {
  const std::int64_t k = GetParam();
  const std::vector<float> x = random_values(2 * k);
  std::vector<float> out(static_cast<std::size_t>(k), NAN);
  PrepareParams params{x.data(), 1, k, 2 * k, Dtype::f32, {nullptr, 0, true}, out.data()};
  ASSERT_TRUE(prepare(params, {}).ok());
  for (std::int64_t j = 0; j < k; ++j) {
    const double gate = x[j];
    EXPECT_NEAR(out[j], gate / (1 + std::exp(-gate)) * static_cast<double>(x[k + j]), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Widths, PrepareOfWidth, testing::Values(1, 7, 33, 512, 576, 1536));

TEST(Prepare, RefusesNothingAndBothAndANegativeEps) {
  float x[4] = {}, out[4];
  EXPECT_FALSE(prepare({x, 1, 4, 4, Dtype::f32, {}, out}, {}).ok());
  EXPECT_FALSE(prepare({x, 1, 2, 4, Dtype::f32, {x, 0, true}, out}, {}).ok());
  EXPECT_FALSE(prepare({x, 1, 4, 4, Dtype::f32, {x, -1, false}, out}, {}).ok());
}

}  // namespace
}  // namespace grinqh
