#include <gtest/gtest.h>

#include <random>

#include "grinqh/core.h"

namespace grinqh {
namespace {

struct Case {
  PlaneWidths widths;
  std::int64_t n, k;
};

class Packing : public ::testing::TestWithParam<Case> {};

std::vector<std::uint8_t> random_codes(std::int64_t count) {
  std::mt19937 engine(7);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(count));
  for (auto& code : codes) code = static_cast<std::uint8_t>(engine());
  return codes;
}

std::vector<std::uint8_t> round_trip(const Case& c, const std::vector<std::uint8_t>& codes,
                                     const std::vector<std::int64_t>& channels,
                                     std::vector<std::vector<std::uint8_t>>& planes) {
  PackParams packed{};
  UnpackParams unpacked{};
  packed.codes = codes.data();
  packed.n = unpacked.n = c.n;
  packed.k = unpacked.k = c.k;
  packed.widths = unpacked.widths = c.widths;
  planes.assign(static_cast<std::size_t>(c.widths.count), {});
  for (int p = 0; p < c.widths.count; ++p) {
    auto& plane = planes[static_cast<std::size_t>(p)];
    packed.channels[p] = unpacked.channels[p] = channels[static_cast<std::size_t>(p)];
    plane.assign(static_cast<std::size_t>(packed.channels[p] * plane_row_bytes(c.n, c.widths.width[p])), 0xa5);
    packed.plane[p] = plane.data();
    unpacked.plane[p] = plane.data();
  }
  EXPECT_TRUE(pack(packed, {}).ok());
  std::vector<std::uint8_t> result(codes.size(), 0x5a);
  unpacked.codes = result.data();
  EXPECT_TRUE(unpack(unpacked, {}).ok());
  return result;
}

TEST_P(Packing, unpack_inverts_pack) {
  const Case& c = GetParam();
  const auto codes = random_codes(c.n * c.k);
  std::vector<std::vector<std::uint8_t>> planes;
  const std::vector<std::int64_t> all(static_cast<std::size_t>(c.widths.count), c.k);
  EXPECT_EQ(round_trip(c, codes, all, planes), codes);
}

TEST_P(Packing, bits_that_are_not_stored_come_back_as_zero) {
  const Case& c = GetParam();
  const auto codes = random_codes(c.n * c.k);
  std::vector<std::int64_t> channels;
  for (int p = 0; p < c.widths.count; ++p) channels.push_back(c.k - c.k * p / c.widths.count);
  std::vector<std::vector<std::uint8_t>> planes;
  const auto result = round_trip(c, codes, channels, planes);
  for (std::int64_t channel = 0; channel < c.k; ++channel) {
    unsigned mask = 0;
    for (int p = 0; p < c.widths.count; ++p) {
      if (channel < channels[static_cast<std::size_t>(p)]) {
        mask |= ((1u << c.widths.width[p]) - 1u) << c.widths.shift(p);
      }
    }
    for (std::int64_t n = 0; n < c.n; ++n) {
      const auto at = static_cast<std::size_t>(channel * c.n + n);
      ASSERT_EQ(result[at], codes[at] & mask) << "channel " << channel << " output " << n;
    }
  }
}

TEST_P(Packing, unused_bits_of_the_last_byte_are_zero) {
  const Case& c = GetParam();
  const std::vector<std::uint8_t> codes(static_cast<std::size_t>(c.n * c.k), 0xff);
  std::vector<std::vector<std::uint8_t>> planes;
  round_trip(c, codes, std::vector<std::int64_t>(static_cast<std::size_t>(c.widths.count), c.k), planes);
  for (int p = 0; p < c.widths.count; ++p) {
    const std::int64_t row = plane_row_bytes(c.n, c.widths.width[p]);
    const int used = static_cast<int>(c.n * c.widths.width[p] - (row - 1) * 8);
    for (std::int64_t channel = 0; channel < c.k; ++channel) {
      ASSERT_EQ(planes[static_cast<std::size_t>(p)][static_cast<std::size_t>(channel * row + row - 1)],
                static_cast<std::uint8_t>((1u << used) - 1u));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(layouts_and_tails, Packing, ::testing::ValuesIn([] {
                           std::vector<Case> cases;
                           const PlaneWidths layouts[] = {
                               kFourEqualPlanes, kFinePlanes, {1, {8}}, {2, {4, 4}}, {8, {1, 1, 1, 1, 1, 1, 1, 1}}};
                           for (const PlaneWidths& widths : layouts) {
                             for (std::int64_t n : {1, 3, 7, 8, 9, 64, 129, 576}) cases.push_back({widths, n, 5});
                           }
                           return cases;
                         }()));

TEST(PackingErrors, name_the_argument_its_value_and_what_is_allowed) {
  std::uint8_t byte = 0;
  PackParams params{};
  params.codes = &byte;
  params.n = 0;
  params.k = 1;
  params.widths = kFourEqualPlanes;
  EXPECT_STREQ(pack(params, {}).message, "n is 0: allowed are 1 to 2147483647");
  params.n = 1;
  params.widths = {2, {3, 5}};
  EXPECT_STREQ(pack(params, {}).message, "widths[0] is 3: allowed are 1, 2, 4 and 8");
  params.widths = {2, {8, 1}};
  EXPECT_STREQ(pack(params, {}).message, "widths add up to 9: allowed are at most 8 bits");
  params.widths = kFourEqualPlanes;
  params.channels[0] = 2;
  EXPECT_STREQ(pack(params, {}).message,
               "channels[0] is 2: allowed are 0 to 1, a plane never stores more channels than the one above");
}

}  // namespace
}  // namespace grinqh
