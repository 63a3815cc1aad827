// Which layers the product of many rows takes, how it is cut and where x lies: host logic, tested without a GPU.
#include <gtest/gtest.h>

#include <set>

#include "product.h"

namespace grinqh::cuda {
namespace {

PackedWeight layer(std::int64_t n, std::int64_t k, PlaneWidths widths = kFourEqualPlanes, std::int64_t block = 64) {
  PackedWeight weight;
  weight.n = n;
  weight.k = k;
  weight.block = block;
  weight.widths = widths;
  return weight;
}

TEST(Product, TakesPlanesOfTwoBitsAndMoreAndSixteenBitRows) {
  EXPECT_TRUE(has_product(layer(1, 64), Dtype::f16));
  EXPECT_TRUE(has_product(layer(1, 64, {2, {4, 4}}, 128), Dtype::bf16));
  EXPECT_FALSE(has_product(layer(1, 64), Dtype::f32));
  EXPECT_FALSE(has_product(layer(1, 64, kFinePlanes), Dtype::f16));
  EXPECT_FALSE(has_product(layer(1, 64, kFourEqualPlanes, 32), Dtype::f16));
}

TEST(Product, TakesChannelsWhoseScalesAreCopiedSixteenBytesAtATime) {
  EXPECT_FALSE(has_product(layer(1, 0), Dtype::f16));
  EXPECT_FALSE(has_product(layer(1, 33), Dtype::f16));
  EXPECT_TRUE(has_product(layer(1, 34), Dtype::f16));
  EXPECT_FALSE(has_product(layer(1, 34, kFourEqualPlanes, 128), Dtype::f16));
  EXPECT_TRUE(has_product(layer(1, 36, kFourEqualPlanes, 128), Dtype::f16));
  EXPECT_TRUE(has_product(layer(1, kMostProductK), Dtype::f16));
  EXPECT_FALSE(has_product(layer(1, kMostProductK + 2), Dtype::f16));
}

TEST(Product, EveryColumnOfEveryRowHasItsOwnPlace) {
  for (const int rows : {64, 128}) {
    std::set<std::int64_t> seen;
    const std::int64_t m = 200, k = 150, steps = product_steps(k);
    for (std::int64_t row = 0; row < m; ++row) {
      for (std::int64_t group = 0; group < 8 * steps; ++group) {
        const std::int64_t at = product_input(row, group, steps, rows);
        EXPECT_EQ(at % 8, 0);
        EXPECT_LE(at + 8, product_input_size(m, k, rows));
        seen.insert(at);
      }
    }
    EXPECT_EQ(seen.size(), static_cast<std::size_t>(m * 8 * steps));
  }
}

TEST(Product, EightRowsReadTheSameColumnsFromEightBanks) {
  std::set<std::int64_t> chunks;
  for (int row = 0; row < 8; ++row) chunks.insert(product_input(row, 3, 1, 64) / 8 % 8);
  EXPECT_EQ(chunks.size(), 8u);
}

TEST(Product, IsCutSoThatTheGpuIsFull) {
  EXPECT_EQ(plan_product(28672, 4096, 512, 132).slices, 1);
  EXPECT_EQ(plan_product(4096, 4096, 512, 132).slices, 2);  // 64 tiles
  EXPECT_EQ(plan_product(4096, 14336, 17, 132).slices, 4);  // 16 tiles
  EXPECT_EQ(plan_product(4096, 64, 17, 132).slices, 1);     // one step
  EXPECT_EQ(plan_product(4096, 4096, 64, 132).rows, 64);
  EXPECT_EQ(plan_product(4096, 4096, 65, 132).rows, 128);
}

}  // namespace
}  // namespace grinqh::cuda
