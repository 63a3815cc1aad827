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

// Of an H100 with 132 multiprocessors.
constexpr ProductRoom kRoom = {{0, 132, 132, 117, 120, 110, 102, 105, 120}};

TEST(Product, IsCutSoThatTheGpuIsFull) {
  EXPECT_EQ(plan_product(6144, 4096, 512, kRoom).slices, 1);  // 96 tiles
  EXPECT_EQ(plan_product(4096, 4096, 512, kRoom).slices, 2);  // 64 tiles
  EXPECT_EQ(plan_product(8192, 8192, 17, kRoom).slices, 3);   // 32 tiles
  EXPECT_EQ(plan_product(4096, 14336, 17, kRoom).slices, 6);  // 16 tiles
  EXPECT_EQ(plan_product(4096, 64, 17, kRoom).slices, 1);     // one step
  EXPECT_EQ(plan_product(4096, 4096, 64, kRoom).rows, 64);
  EXPECT_EQ(plan_product(4096, 4096, 65, kRoom).rows, 128);
}

TEST(Product, TilesOfFullTurnsAreWholeAndTheLastTurnIsCut) {
  const ProductPlan plan = plan_product(28672, 4096, 512, kRoom);  // 448 tiles
  EXPECT_EQ(plan.whole, 3 * 132);
  EXPECT_EQ(plan.slices, 2);
}

TEST(Product, ClustersOfWholeTilesAreComplete) {
  for (const ProductRoom& room : {kRoom, ProductRoom{{0, 1, 2, 3, 4, 5, 6, 7, 8}}, ProductRoom{}}) {
    for (std::int64_t n = 256; n < 100'000; n += 4096 - 256) {
      const ProductPlan plan = plan_product(n, 4096, 300, room);
      EXPECT_EQ(plan.whole % plan.slices, 0);
      EXPECT_LE(plan.whole, tile_count(n) * 3);
    }
  }
}

}  // namespace
}  // namespace grinqh::cuda
