// The tile order and the cut of the GEMV: host logic, tested without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>
#include <utility>

#include "attention.h"
#include "layout.h"
#include "plan.h"

namespace grinqh::cuda {
namespace {

constexpr Gpu kH100{132, 232448};
constexpr Gpu kSmall{84, 101376};  // sm_86

TEST(Layout, EveryBitOfARunBelongsToOneOutput) {
  for (const int width : {1, 2}) {
    std::set<std::pair<int, int>> seen;
    for (int output = 0; output < kTile; ++output) {
      const RunPosition at = run_position(output, width);
      EXPECT_LT(at.byte, run_bytes(width));
      EXPECT_EQ(at.shift % width, 0);
      EXPECT_EQ(run_output(at.byte, at.shift, width), output);
      seen.insert({at.byte, at.shift});
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(kTile));
  }
}

TEST(Layout, MaskedBytesAreCodesTimesAPowerOfFourForBothWidths) {
  for (int output = 0; output < kTile; ++output) {
    const int i = output / 16;
    EXPECT_EQ(run_position(output, 2).shift, 2 * (i % 4));
    EXPECT_EQ(run_position(output, 1).shift - i / 4 % 2, 2 * (i % 4));
  }
}

TEST(Layout, RunsOfATileAndSubplaneDoNotOverlap) {
  EXPECT_EQ(run_offset(0, 1, 10, 64), 64);
  EXPECT_EQ(run_offset(1, 0, 10, 64), 640);
  EXPECT_EQ(plane_bytes(300, 10, 8), 4 * 2 * 10 * 64);
  EXPECT_EQ(scale_count(300, 10, 64), (2 * 4 + 1) * 10);
}

class PlanOfShape : public testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(PlanOfShape, SlicesDoNotDependOnTheRows) {
  const auto [n, k] = GetParam();
  for (const Gpu& gpu : {kH100, kSmall}) {
    for (const bool one_bit : {false, true}) {
      const int subplanes = one_bit ? 8 : 4;
      for (const int block : {32, 64, 128}) {
        const GemvPlan alone = plan_gemv({n, k, 1, subplanes, one_bit, {}, block}, gpu);
        for (const int m : {2, 3, 4, 5, 8, 16}) {
          EXPECT_EQ(plan_gemv({n, k, m, subplanes, one_bit, {}, block}, gpu).slices, alone.slices);
        }
      }
    }
  }
}

TEST_P(PlanOfShape, FitsSharedMemoryAndCoversTheTiles) {
  const auto [n, k] = GetParam();
  for (const Gpu& gpu : {kH100, kSmall}) {
    for (const int subplanes : {1, 4, 5, 8}) {
      for (const auto& [m, block] : {std::pair{1, 32}, {1, 64}, {2, 64}, {4, 128}, {8, 32}, {8, 64}, {8, 128}}) {
        const bool one_bit = subplanes > 4;
        const GemvPlan plan = plan_gemv({n, k, m, subplanes, one_bit, {}, block}, gpu);
        const GemvInstance instance = gemv_instance(m, one_bit, plan.large);
        const int chunks = (k + kSlab - 1) / kSlab, slice_chunks = (chunks + plan.slices - 1) / plan.slices;
        EXPECT_LE(plan_detail::shared_bytes(instance, block, plan.k_warps, plan.turns, subplanes, slice_chunks),
                  gpu.shared_bytes);
        EXPECT_EQ(instance.warps % plan.k_warps, 0);
        EXPECT_GE(plan.k_warps, 2);
        EXPECT_EQ(plan.k_warps % instance.split, 0);  // warps that split a slab work on one tile
        const std::int64_t groups = std::int64_t{instance.warps / plan.k_warps} * plan.columns;
        EXPECT_GE(plan.turns * groups, tile_count(n));
        EXPECT_LT((plan.turns - 1) * groups, tile_count(n));
        EXPECT_EQ(plan.k_warps % plan.sharers, 0);
        EXPECT_EQ(instance.rows * kTile / 4 % plan.sharers, 0);  // in quads of outputs
        EXPECT_GE(plan.columns, 1);
        EXPECT_LE(plan.slices, chunks);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlanOfShape,
                         testing::Values(std::tuple{1, 1}, std::tuple{576, 576}, std::tuple{4096, 4096},
                                         std::tuple{28672, 4096}, std::tuple{4096, 14336}, std::tuple{57344, 8192},
                                         std::tuple{8192, 28672}, std::tuple{300, 100000}));

TEST(Plan, ABlockOfOutputsHasAScaleForEachChannelInFlight) {
  const GemvInstance one = gemv_instance(1, false, true), eight = gemv_instance(8, false, true);
  const auto bytes = [](const GemvInstance& instance, int block) {
    return plan_detail::shared_bytes(instance, block, instance.warps, 1, 4, 16);
  };
  EXPECT_EQ(bytes(one, 32) - bytes(one, 64), one.warps * one.stages * kSlab * 4 * 2);
  EXPECT_EQ(bytes(eight, 64) - bytes(eight, 128), eight.warps / 2 * eight.stages * kSlab * 2 * 2);  // two share slabs
}

TEST(Plan, WorkspaceCountsEverySharerOfATileInEveryLayer) {
  GemvPlan plan;
  plan.slices = 3;
  plan.slots = 2;
  plan.sharers = 2;
  EXPECT_EQ(gemv_partial_count(plan, 2), 3 * 2 * 512);
  EXPECT_EQ(gemv_counter_count(plan, 1), 2 * 2);
  EXPECT_EQ(gemv_counter_count(plan, 16), 2 * 2 * 2);
  plan.sharers = 4;
  EXPECT_EQ(gemv_counter_count(plan, 1), 2 * 4);
  plan.slices = 1;
  EXPECT_EQ(gemv_partial_count(plan, 2), 0);
}

TEST(Plan, AllWarpsOfATileShareItsResultsWhereABlockHasSeveral) {
  for (const int m : {1, 2, 4, 8}) {
    const GemvPlan several = plan_gemv({57344, 8192, m}, kH100), one = plan_gemv({4096, 4096, m}, kH100);
    EXPECT_EQ(several.sharers, several.k_warps);
    EXPECT_EQ(one.sharers, std::min(one.k_warps, 2 * m));
  }
}

TEST(Plan, OneTurnNeedsNoSecondBufferOfSums) {
  EXPECT_EQ(sum_buffers(1), 1);
  EXPECT_EQ(sum_buffers(2), 2);
  const GemvInstance eight = gemv_instance(8, false, true);
  const int second =
      plan_detail::shared_bytes(eight, 64, 2, 2, 4, 15) - plan_detail::shared_bytes(eight, 64, 2, 1, 4, 15);
  EXPECT_EQ(second, eight.warps / 2 * 8 * kMostSumsRow * 4);
}

TEST(Plan, EverySectionHasColumnsAndNoTwoShareATileSlot) {
  const Sections cases[] = {
      {1, {}},           {2, {14336, 14336}},        {3, {4096, 1024, 1024}}, {3, {576, 192, 192}},
      {4, {1, 1, 1, 1}}, {4, {255, 1, 256, 1000000}}};
  for (const Sections& sections : cases) {
    std::int64_t n = 0;
    for (const std::int64_t size : sections.size) n += size;
    if (sections.count == 1) n = 6144;
    for (const Gpu& gpu : {kH100, kSmall}) {
      for (const int m : {1, 2, 8}) {
        const GemvPlan plan = plan_gemv({n, 4096, m, 4, false, sections}, gpu);
        EXPECT_EQ(plan.sections, sections.count);
        int columns = 0;
        std::set<std::int64_t> slots;
        for (int s = 0; s < sections.count; ++s) {
          EXPECT_GE(plan.section_columns[s], 1);
          columns += plan.section_columns[s];
          const int groups = plan.section_columns[s] * gemv_instance(m, false, plan.large).warps / plan.k_warps;
          const TileRange tiles = section_tiles(sections, s, n);
          const auto [begin, end] = sections.outputs(s, n);
          EXPECT_GE(std::int64_t{plan.turns} * groups, tiles.end - tiles.begin);
          EXPECT_LE(tiles.begin * kTile, begin);
          EXPECT_GE(tiles.end * kTile, end);
          for (std::int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            EXPECT_TRUE(slots.insert(tile + s).second);
            EXPECT_LT(tile + s, plan.slots);
          }
        }
        EXPECT_EQ(plan.columns, columns);
        EXPECT_LE(plan.columns * plan.slices, std::max(gpu.multiprocessors, plan.slices * sections.count));
      }
    }
  }
}

TEST(Plan, AnAlignedSectionCostsNoTurnThatTheWholeLayerDoesNotHave) {
  // q, k and v of Llama-3-8B: 16, 4 and 4 tiles.
  const GemvPlan whole = plan_gemv({6144, 4096, 1, 4, false, {}}, kH100);
  const GemvPlan parted = plan_gemv({6144, 4096, 1, 4, false, {3, {4096, 1024, 1024}}}, kH100);
  EXPECT_EQ(parted.slices, whole.slices);
  EXPECT_EQ(parted.k_warps, whole.k_warps);
  EXPECT_EQ(parted.columns, whole.columns);
}

TEST(AttentionPlan, EverySplitHasAStepOfPositionsAndThereAreNoMoreThanMayBe) {
  for (const int dim : {64, 128, 256}) {
    const std::int64_t step = attention_step(dim);
    EXPECT_EQ(attention_splits(0, dim), 1);
    EXPECT_EQ(attention_splits(1, dim), 1);
    EXPECT_EQ(attention_splits(step, dim), 1);
    EXPECT_EQ(attention_splits(step + 1, dim), 2);
    EXPECT_EQ(attention_splits(15 * step + 1, dim), 16);
    EXPECT_EQ(attention_splits(kMostPositions, dim), kAttentionSplits);
  }
}

TEST(AttentionPlan, WorkspaceCountsEveryBlockUnlessItIsAlone) {
  AttentionParams params{};
  params.batch = 3;
  params.kv_heads = 2;
  params.group = 5;  // two blocks: four query heads and one
  params.dim = 128;
  params.splits = attention_splits(1000, 128);
  EXPECT_EQ(params.splits, 16);
  EXPECT_EQ(attention_counter_count(params), 3 * 2 * 2);
  EXPECT_EQ(attention_partial_count(params), 12 * 16 * 4 * (128 + 2));
  params.splits = attention_splits(64, 128);
  EXPECT_EQ(params.splits, 1);
  EXPECT_EQ(attention_partial_count(params), 0);
}

}  // namespace
}  // namespace grinqh::cuda
