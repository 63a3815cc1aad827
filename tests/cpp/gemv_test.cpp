#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "cpu/kernels.h"
#include "layer.h"

namespace grinqh {
namespace {

using testing::Layer;
using testing::random_floats;
using testing::random_layer;
using testing::Reference;

// What the fixed point of the vector kernels and float32 sums may lose, of the sum of the terms' magnitudes.
constexpr double kTolerance = 1e-4;

std::vector<Isa> isas() {
  std::vector<Isa> result;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::neon}) {
    if (isa_available(isa)) result.push_back(isa);
  }
  return result;
}

std::vector<float> product(const Layer& layer, const std::vector<float>& x, Isa isa, const Executor& executor = {},
                           const Grading* grading = nullptr, std::vector<float>* read_bits = nullptr) {
  GemvParams params{};
  params.x = x.data();
  params.m = static_cast<std::int64_t>(x.size()) / layer.k;
  params.x_stride = layer.k;
  params.dtype = Dtype::f32;
  params.weight = layer.packed();
  params.grading = grading != nullptr ? *grading : layer.grading();
  params.isa = isa;
  std::vector<float> y(static_cast<std::size_t>(params.m * layer.n), std::numeric_limits<float>::quiet_NaN());
  params.y = y.data();
  if (read_bits != nullptr) {
    read_bits->assign(static_cast<std::size_t>(params.m), -1.0f);
    params.read_bits = read_bits->data();
  }
  const Status status = gemv(params, executor);
  EXPECT_TRUE(status.ok()) << status.message;
  return y;
}

void expect_close(const Layer& layer, const std::vector<float>& x, const std::vector<float>& y) {
  for (std::int64_t m = 0; m * layer.k < static_cast<std::int64_t>(x.size()); ++m) {
    const Reference reference = testing::reference_product(layer, x.data() + m * layer.k);
    for (std::int64_t n = 0; n < layer.n; ++n) {
      const auto i = static_cast<std::size_t>(n);
      ASSERT_NEAR(y[static_cast<std::size_t>(m * layer.n + n)], reference.y[i],
                  kTolerance * reference.magnitude[i] + 1e-30)
          << "row " << m << " output " << n;
    }
  }
}

class Gemv : public ::testing::TestWithParam<Isa> {};

TEST_P(Gemv, agrees_with_the_float64_reference_for_every_layout_block_and_tail) {
  const PlaneWidths layouts[] = {kFourEqualPlanes, kFinePlanes, {1, {8}}, {2, {4, 4}}, {8, {1, 1, 1, 1, 1, 1, 1, 1}}};
  const std::int64_t sizes[][2] = {{1, 1}, {7, 33}, {65, 130}, {576, 300}, {4099, 33}, {130, 1536}};
  unsigned seed = 0;
  for (const PlaneWidths& widths : layouts) {
    for (const auto& size : sizes) {
      for (std::int64_t block : {32, 64, 128}) {
        const Layer layer = random_layer(size[0], size[1], widths, block, 1.0, ++seed);
        const auto x = random_floats(static_cast<std::size_t>(2 * layer.k), seed);
        SCOPED_TRACE(::testing::Message()
                     << widths.count << " planes, n " << layer.n << ", k " << layer.k << ", block " << block);
        expect_close(layer, x, product(layer, x, GetParam()));
      }
    }
  }
}

TEST_P(Gemv, reads_each_channel_at_most_as_deep_as_it_is_stored) {
  const Layer layer = random_layer(200, 160, kFinePlanes, 64, 0.2);
  const auto x = random_floats(static_cast<std::size_t>(3 * layer.k), 5, 4.0f);
  expect_close(layer, x, product(layer, x, GetParam()));
}

TEST_P(Gemv, every_single_grade_is_right) {
  Layer layer = random_layer(150, 140, kFinePlanes);
  const auto x = random_floats(static_cast<std::size_t>(layer.k), 6);
  for (int grade = 0; grade <= layer.widths.count; ++grade) {
    for (int p = 0; p < layer.widths.count; ++p) {
      layer.thresholds[static_cast<std::size_t>(p)] = p < grade ? 0.0f : std::numeric_limits<float>::infinity();
    }
    std::vector<float> bits;
    SCOPED_TRACE(grade);
    expect_close(layer, x, product(layer, x, GetParam(), {}, nullptr, &bits));
    EXPECT_EQ(bits[0], static_cast<float>(layer.widths.bits(grade)));
  }
}

TEST_P(Gemv, a_row_does_not_depend_on_the_rows_beside_it) {
  const Layer layer = random_layer(300, 700, kFinePlanes);
  const auto x = random_floats(static_cast<std::size_t>(19 * layer.k), 8);
  const auto together = product(layer, x, GetParam());
  for (std::size_t m = 0; m < 19; ++m) {
    const auto begin = x.begin() + static_cast<std::ptrdiff_t>(m) * layer.k;
    const auto alone = product(layer, {begin, begin + layer.k}, GetParam());
    const auto row = together.begin() + static_cast<std::ptrdiff_t>(m) * layer.n;
    ASSERT_TRUE(std::equal(alone.begin(), alone.end(), row)) << "row " << m;
  }
}

// Each piece on a thread of its own, in any order.
void run_on_threads(std::int64_t count, std::int64_t grain, Executor::Body body, void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t begin = 0; begin < count; begin += grain) {
    threads.emplace_back(body, begin, std::min(count, begin + grain), context);
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(Gemv, threads_do_not_change_a_bit) {
  const Layer layer = random_layer(1000, 1100, kFourEqualPlanes);
  const auto x = random_floats(static_cast<std::size_t>(2 * layer.k), 9);
  EXPECT_EQ(product(layer, x, GetParam()), product(layer, x, GetParam(), {run_on_threads}));
}

TEST_P(Gemv, what_is_not_finite_gives_what_a_product_gives_and_stays_in_its_row) {
  const Layer layer = random_layer(70, 50, kFinePlanes);
  auto x = random_floats(static_cast<std::size_t>(4 * layer.k), 10);
  const auto finite = product(layer, x, GetParam());
  constexpr float kInf = std::numeric_limits<float>::infinity();
  x[0] = std::numeric_limits<float>::quiet_NaN();
  x[static_cast<std::size_t>(layer.k) + 3] = -kInf;
  x[static_cast<std::size_t>(2 * layer.k)] = kInf;
  x[static_cast<std::size_t>(2 * layer.k) + 1] = kInf;
  const auto y = product(layer, x, GetParam());
  const auto stored_at = [&](std::int32_t feature) {
    return std::find(layer.order.begin(), layer.order.end(), feature) - layer.order.begin();
  };
  for (std::int64_t n = 0; n < layer.n; ++n) {
    const auto i = static_cast<std::size_t>(n);
    const auto at = [&](std::size_t row) { return y[row * static_cast<std::size_t>(layer.n) + i]; };
    const auto sign = [&](std::int32_t feature) {
      return testing::weight_at(layer, stored_at(feature), n, layer.widths.count) > 0.0;
    };
    EXPECT_TRUE(std::isnan(at(0)));
    EXPECT_EQ(at(1), sign(3) ? -kInf : kInf);
    if (sign(0) == sign(1)) {
      EXPECT_EQ(at(2), sign(0) ? kInf : -kInf);
    } else {
      EXPECT_TRUE(std::isnan(at(2)));
    }
    EXPECT_EQ(at(3), finite[3 * static_cast<std::size_t>(layer.n) + i]);
  }
}

TEST_P(Gemv, one_large_activation_does_not_spoil_the_others) {
  const Layer layer = random_layer(256, 512, kFourEqualPlanes);
  auto x = random_floats(static_cast<std::size_t>(layer.k), 11);
  x[100] += 1000.0f;
  expect_close(layer, x, product(layer, x, GetParam()));
}

TEST_P(Gemv, a_budget_is_never_exceeded_and_nearly_used_up) {
  const Layer layer = random_layer(64, 2000, kFinePlanes);
  const auto x = random_floats(static_cast<std::size_t>(5 * layer.k), 12);
  for (float budget : {0.0f, 0.7f, 2.0f, 3.3f, 8.0f, 100.0f}) {
    Grading grading = layer.grading();
    grading.budget = &budget;
    std::vector<float> bits;
    product(layer, x, GetParam(), {}, &grading, &bits);
    for (float read : bits) {
      EXPECT_LE(read, budget);
      // One more channel, of at most 2 bits more, would be too much.
      EXPECT_GE(read, std::min(budget, 8.0f) - 2.0f / static_cast<float>(layer.k));
    }
  }
}

// A layer of three sections that begin within tiles, with thresholds for each.
struct SectionedLayer {
  Layer layer = random_layer(410, 300, kFourEqualPlanes, 64, 0.5, 20);
  Sections sections{3, {200, 10, 200}};
  std::vector<float> thresholds{0.1f, 0.5f, 1, 2, 1, 1.5f, 2, 3, 0.01f, 0.02f, 0.5f, 1};  // section after section

  Grading grading() const { return {layer.channel_weight.data(), thresholds.data(), nullptr, sections}; }
  // The layer with the thresholds of one section for all outputs.
  Layer graded_as(int section) const {
    Layer graded = layer;
    graded.thresholds.assign(thresholds.begin() + 4 * section, thresholds.begin() + 4 * (section + 1));
    return graded;
  }
};

TEST_P(Gemv, every_section_of_the_outputs_has_thresholds_of_its_own) {
  const SectionedLayer sectioned;
  const Layer& layer = sectioned.layer;
  auto x = random_floats(static_cast<std::size_t>(2 * layer.k), 21);
  x[7] = std::numeric_limits<float>::infinity();
  const Grading grading = sectioned.grading();
  std::vector<float> bits;
  const auto y = product(layer, x, GetParam(), {}, &grading, &bits);
  for (int m = 0; m < 2; ++m) {
    double expected_bits = 0;
    for (int s = 0; s < 3; ++s) {
      const Layer graded = sectioned.graded_as(s);
      const Reference reference = testing::reference_product(graded, x.data() + m * layer.k);
      const auto [begin, end] = grading.sections.outputs(s, layer.n);
      for (std::int64_t n = begin; n < end; ++n) {
        const auto i = static_cast<std::size_t>(n);
        const float value = y[static_cast<std::size_t>(m * layer.n + n)];
        if (m == 0) {
          ASSERT_FALSE(std::isfinite(value)) << "output " << n;
        } else {
          ASSERT_NEAR(value, reference.y[i], kTolerance * reference.magnitude[i] + 1e-30) << "output " << n;
        }
      }
      for (std::int64_t c = 0; c < layer.k; ++c) {
        const float value = x[static_cast<std::size_t>(m * layer.k + layer.order[static_cast<std::size_t>(c)])];
        expected_bits += layer.widths.bits(testing::grade_of(graded, c, value)) * static_cast<double>(end - begin);
      }
    }
    EXPECT_FLOAT_EQ(bits[static_cast<std::size_t>(m)],
                    static_cast<float>(expected_bits / static_cast<double>(layer.n * layer.k)));
  }
}

TEST_P(Gemv, a_budget_holds_for_the_sections_together) {
  const SectionedLayer sectioned;
  const auto x = random_floats(static_cast<std::size_t>(5 * sectioned.layer.k), 22);
  for (float budget : {0.5f, 2.0f, 3.3f}) {
    Grading grading = sectioned.grading();
    grading.budget = &budget;
    std::vector<float> bits;
    product(sectioned.layer, x, GetParam(), {}, &grading, &bits);
    for (float read : bits) {
      EXPECT_LE(read, budget);
      EXPECT_GE(read, budget - 2.0f / static_cast<float>(sectioned.layer.k));
    }
  }
}

TEST_P(Gemv, sections_of_the_same_thresholds_read_what_a_layer_without_reads) {
  SectionedLayer sectioned;
  const Layer& layer = sectioned.layer;
  for (int s = 0; s < 3; ++s) std::copy_n(layer.thresholds.begin(), 4, sectioned.thresholds.begin() + 4 * s);
  const auto x = random_floats(static_cast<std::size_t>(3 * layer.k), 23);
  const Grading grading = sectioned.grading();
  std::vector<float> bits, whole_bits;
  expect_close(layer, x, product(layer, x, GetParam(), {}, &grading, &bits));
  product(layer, x, GetParam(), {}, nullptr, &whole_bits);
  EXPECT_EQ(bits, whole_bits);
}

INSTANTIATE_TEST_SUITE_P(instruction_sets, Gemv, ::testing::ValuesIn(isas()),
                         [](const auto& info) { return isa_name(info.param); });

TEST(GemvDtypes, sixteen_bit_inputs_give_the_rounded_float32_result) {
  const Layer layer = random_layer(96, 200, kFinePlanes);
  const auto exact = random_floats(static_cast<std::size_t>(layer.k), 13);
  for (Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    std::vector<std::uint16_t> x(exact.size());
    std::vector<float> rounded(exact.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      store_float(x.data(), static_cast<std::int64_t>(i), dtype, exact[i]);
      rounded[i] = load_float(x.data(), static_cast<std::int64_t>(i), dtype);
    }
    const auto expected = product(layer, rounded, Isa::scalar);
    std::vector<std::uint16_t> y(static_cast<std::size_t>(layer.n)), bias(y.size());
    for (std::size_t n = 0; n < y.size(); ++n) {
      store_float(bias.data(), static_cast<std::int64_t>(n), dtype, 0.5f * static_cast<float>(n));
    }
    GemvParams params{};
    params.x = x.data();
    params.m = 1;
    params.x_stride = layer.k;
    params.dtype = dtype;
    params.weight = layer.packed();
    params.grading = layer.grading();
    params.bias = bias.data();
    params.y = y.data();
    params.isa = Isa::scalar;
    ASSERT_TRUE(gemv(params, {}).ok());
    for (std::size_t n = 0; n < y.size(); ++n) {
      std::uint16_t want[2] = {};
      store_float(want, 0, dtype, expected[n] + load_float(bias.data(), static_cast<std::int64_t>(n), dtype));
      ASSERT_EQ(y[n], want[0]);
    }
  }
}

TEST(GemvErrors, name_the_argument_its_value_and_what_is_allowed) {
  Layer layer = random_layer(8, 8, kFourEqualPlanes);
  const auto x = random_floats(8, 14);
  std::vector<float> y(8, 3.0f);
  GemvParams params{};
  params.x = x.data();
  params.m = 1;
  params.x_stride = 8;
  params.weight = layer.packed();
  params.y = y.data();
  params.isa = Isa::scalar;
  const auto message_for = [&](std::vector<float> thresholds) {
    layer.thresholds = thresholds;
    params.grading = layer.grading();
    return std::string(gemv(params, {}).message);
  };
  EXPECT_EQ(message_for({1, 2, 0.5f, 3}),
            "thresholds[2] is 0.5: allowed are numbers of at least 2, thresholds never fall and are not NaN");
  EXPECT_EQ(message_for({-1, 2, 3, 4}),
            "thresholds[0] is -1: allowed are numbers of at least 0, thresholds never fall and are not NaN");
  EXPECT_EQ(message_for({std::nanf(""), 2, 3, 4}).substr(0, 20), "thresholds[0] is nan");
  EXPECT_EQ(y, std::vector<float>(8, 3.0f)) << "nothing may be written where the input is refused";
  EXPECT_EQ(message_for({1, 2, 3, 4}), "");
  const auto message_for_sections = [&](const Sections& sections) {
    params.grading.sections = sections;
    return std::string(gemv(params, {}).message);
  };
  layer.thresholds.resize(4 * (kMaxSections + 1), 5.0f);
  params.grading = layer.grading();
  EXPECT_EQ(message_for_sections({5, {1, 1, 1, 1}}), "sections has 5 entries: allowed are at most 4");
  EXPECT_EQ(message_for_sections({2, {4, 0}}), "sections[1] is 0: allowed are 1 to 4, the outputs that are left of 8");
  EXPECT_EQ(message_for_sections({2, {9, -1}}), "sections[0] is 9: allowed are 1 to 8, the outputs that are left of 8");
  EXPECT_EQ(message_for_sections({2, {4, 3}}), "sections add up to 7: they must to n, 8");
  layer.thresholds = {1, 2, 3, 4, 1, 2, 0, 4};
  params.grading = layer.grading();
  EXPECT_EQ(message_for_sections({2, {4, 4}}).substr(0, 52), "thresholds[6] is 0: allowed are numbers of at least ");
  layer.thresholds = {1, 2, 3, 4, 0, 1, 1, 1};
  params.grading = layer.grading();
  EXPECT_EQ(message_for_sections({2, {4, 4}}), "");
  params.weight.block = 48;
  EXPECT_STREQ(gemv(params, {}).message, "block is 48: allowed are 32, 64 and 128");
}

TEST(Grade, counts_the_thresholds_at_or_below_the_importance) {
  Layer layer = random_layer(4, 3, kFourEqualPlanes);
  layer.order = {2, 0, 1};
  layer.channel_weight = {1.0f, 2.0f, 1.0f};
  layer.thresholds = {1.0f, 2.0f, 2.0f, std::numeric_limits<float>::infinity()};
  const std::vector<float> x{-1.0f, std::nanf(""), 0.99f};
  std::vector<std::uint8_t> grades(3, 9);
  GradeParams params{};
  params.x = x.data();
  params.m = 1;
  params.x_stride = 3;
  params.weight = layer.packed();
  params.grading = layer.grading();
  params.grades = grades.data();
  ASSERT_TRUE(grade(params, {}).ok());
  EXPECT_EQ(grades, (std::vector<std::uint8_t>{0, 3, 4}));

  layer.thresholds = {1, 2, 2, std::numeric_limits<float>::infinity(), 0, 0.5f, 0.9f, 1.5f};
  params.grading = layer.grading();
  params.grading.sections = {2, {1, 3}};
  grades.assign(6, 9);
  params.grades = grades.data();
  ASSERT_TRUE(grade(params, {}).ok());
  EXPECT_EQ(grades, (std::vector<std::uint8_t>{0, 3, 4, 3, 4, 4}));
}

TEST(Dequantize, gives_the_weights_of_format_h_in_the_order_of_the_input) {
  for (const PlaneWidths& widths : {kFourEqualPlanes, kFinePlanes, PlaneWidths{2, {4, 4}}}) {
    const Layer layer = random_layer(300, 40, widths, 32, 0.5);
    for (int grade = 0; grade <= widths.count; ++grade) {
      std::vector<float> out(static_cast<std::size_t>(layer.k * (layer.n - 128)));
      DequantizeParams params{layer.packed(), grade, 128, layer.n, Dtype::f32, out.data()};
      ASSERT_TRUE(dequantize(params, {}).ok());
      for (std::int64_t c = 0; c < layer.k; ++c) {
        int stored = 0;
        while (stored < widths.count && layer.channels[static_cast<std::size_t>(stored)] > c) ++stored;
        for (std::int64_t n = 128; n < layer.n; ++n) {
          const double want = testing::weight_at(layer, c, n, std::min(grade, stored));
          const auto at = layer.order[static_cast<std::size_t>(c)] * (layer.n - 128) + n - 128;
          ASSERT_NEAR(out[static_cast<std::size_t>(at)], want, 1e-6 * std::fabs(want));
        }
      }
    }
  }
}

TEST(KernelFunctions, decode_and_store_alike_on_every_instruction_set) {
  const Layer layer = random_layer(203, 9, kFinePlanes);
  for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    std::vector<std::vector<char>> results;
    for (Isa isa : isas()) {
      const cpu::Kernels kernels = cpu::kernels_for(isa);
      std::vector<float> values(static_cast<std::size_t>(layer.n));
      std::vector<char> out(static_cast<std::size_t>(layer.n * 4), 17);
      kernels.decode_channel(layer.packed(), 4, 3, {0, layer.n}, values.data());
      kernels.scale_and_store(values.data(), layer.row_scale.data(), 0.97f, layer.n, dtype, out.data());
      results.push_back(out);
    }
    for (const auto& result : results) EXPECT_EQ(result, results[0]);
  }
}

}  // namespace
}  // namespace grinqh
