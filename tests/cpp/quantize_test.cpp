#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "layer.h"

namespace grinqh {
namespace {

using testing::Layer;
using testing::random_layer;

TEST(Half, every_pattern_survives_the_way_through_float32) {
  for (unsigned pattern = 0; pattern < 65536; ++pattern) {
    const auto half = static_cast<std::uint16_t>(pattern);
    const float value = half_to_float(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(value))));
    } else {
      ASSERT_EQ(float_to_half(value), half) << pattern;
    }
  }
}

TEST(Half, rounds_to_nearest_with_ties_to_even) {
  EXPECT_EQ(float_to_half(1.0f + 0x1p-11f), 0x3c00);             // a tie
  EXPECT_EQ(float_to_half(1.0f + 0x1p-11f + 0x1p-20f), 0x3c01);  // above it
  EXPECT_EQ(float_to_half(1.0f + 3 * 0x1p-11f), 0x3c02);         // a tie, up to even
  EXPECT_EQ(float_to_half(0x1p-25f), 0x0000);                    // half the smallest subnormal
  EXPECT_EQ(float_to_half(65519.0f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_bfloat16(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(float_to_bfloat16(1.0f + 3 * 0x1p-8f), 0x3f82);
}

TEST(Quantize, full_codes_are_within_half_a_step_of_the_weight) {
  const Layer layer = random_layer(100, 40, {1, {8}});
  const std::int64_t blocks = block_count(layer.n, layer.block);
  for (std::int64_t c = 0; c < layer.k; ++c) {
    for (std::int64_t n = 0; n < layer.n; ++n) {
      const float scale = layer.row_scale[static_cast<std::size_t>(n)] *
                          half_to_float(layer.block_scale[static_cast<std::size_t>(c * blocks + n / layer.block)]);
      const float weight =
          layer.dense[static_cast<std::size_t>(n * layer.k + layer.order[static_cast<std::size_t>(c)])];
      const float value = scale * level(layer.codes[static_cast<std::size_t>(c * layer.n + n)], 8);
      // A block's largest weight may lie above its rounded scale by half a unit of float16.
      ASSERT_LE(std::fabs(value - weight), scale * (1.0f / 256 + 0x1p-11f)) << c << " " << n;
    }
  }
}

TEST(Quantize, channel_errors_are_those_of_the_dequantized_weights) {
  const Layer layer = random_layer(90, 12, {8, {1, 1, 1, 1, 1, 1, 1, 1}});
  for (int bits = 0; bits <= kCodeBits; ++bits) {
    for (std::int64_t c = 0; c < layer.k; ++c) {
      double sum = 0.0;
      for (std::int64_t n = 0; n < layer.n; ++n) {
        const double weight =
            layer.dense[static_cast<std::size_t>(n * layer.k + layer.order[static_cast<std::size_t>(c)])];
        sum += std::pow(weight - testing::weight_at(layer, c, n, bits), 2.0);
      }
      const double error = layer.channel_error[static_cast<std::size_t>(bits * layer.k + c)];
      EXPECT_NEAR(error, sum / static_cast<double>(layer.n), 1e-5 * (1.0 + error)) << bits << " bits, channel " << c;
    }
  }
}

TEST(Quantize, no_other_gain_gives_a_smaller_error) {
  const Layer layer = random_layer(256, 32, kFourEqualPlanes);
  for (int grade = 1; grade <= layer.widths.count; ++grade) {
    const auto error_with = [&](double factor) {
      double sum = 0.0;
      for (std::int64_t c = 0; c < layer.k; ++c) {
        for (std::int64_t n = 0; n < layer.n; ++n) {
          const double weight =
              layer.dense[static_cast<std::size_t>(n * layer.k + layer.order[static_cast<std::size_t>(c)])];
          sum += std::pow(weight - factor * testing::weight_at(layer, c, n, grade), 2.0);
        }
      }
      return sum;
    };
    EXPECT_LT(error_with(1.0), error_with(0.99));
    EXPECT_LT(error_with(1.0), error_with(1.01));
  }
}

TEST(Quantize, a_weight_of_zeros_gives_zeros) {
  std::vector<float> zeros(6, 0.0f);
  std::vector<std::int32_t> order{0, 1};
  std::vector<std::uint8_t> codes(6);
  std::vector<std::uint16_t> scales(2, 0xffff);
  std::vector<float> rows(3), gain(9), errors(18, -1.0f);
  const QuantizeParams params{zeros.data(), order.data(),  3,           2,           64,
                              codes.data(), scales.data(), rows.data(), gain.data(), errors.data()};
  ASSERT_TRUE(quantize(params, {}).ok());
  EXPECT_EQ(scales, (std::vector<std::uint16_t>{0, 0}));
  EXPECT_EQ(errors, std::vector<float>(18, 0.0f));
}

TEST(Quantize, refuses_weights_that_are_not_finite_and_orders_that_are_no_permutation) {
  std::vector<float> weight{1.0f, 2.0f, 3.0f, std::numeric_limits<float>::quiet_NaN()};
  std::vector<std::int32_t> order{0, 1};
  std::vector<std::uint8_t> codes(4);
  std::vector<std::uint16_t> scales(2);
  std::vector<float> rows(2), gain(9), errors(18);
  const QuantizeParams params{weight.data(), order.data(),  2,           2,           64,
                              codes.data(),  scales.data(), rows.data(), gain.data(), errors.data()};
  EXPECT_STREQ(quantize(params, {}).message, "weight has a NaN or infinite value in row 1: allowed are finite values");
  weight[3] = 4.0f;
  order[1] = 0;
  EXPECT_STREQ(quantize(params, {}).message, "channel_order[1] is 0, which occurred before: it must be a permutation");
  order[1] = 2;
  EXPECT_STREQ(quantize(params, {}).message, "channel_order holds 2: allowed are 0 to 1");
}

TEST(SortChannels, orders_by_mean_square_times_energy_with_ties_by_index) {
  const std::vector<float> weight{1.0f, 2.0f, 1.0f, 0.0f,  //
                                  0.0f, 1.0f, 0.0f, 3.0f};
  std::vector<std::int32_t> order(4);
  SortParams params{weight.data(), nullptr, 2, 4, order.data()};
  ASSERT_TRUE(sort_channels(params, {}).ok());
  EXPECT_EQ(order, (std::vector<std::int32_t>{3, 1, 0, 2}));
  const std::vector<float> mean_square{100.0f, 1.0f, 0.0f, 1.0f};
  params.mean_square = mean_square.data();
  ASSERT_TRUE(sort_channels(params, {}).ok());
  EXPECT_EQ(order, (std::vector<std::int32_t>{0, 3, 1, 2}));
}

}  // namespace
}  // namespace grinqh
