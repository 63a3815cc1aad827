// Many rows times all stored planes, without dense weights in memory. A block of four warpgroups has a tile of 256
// outputs, some rows and a slice of the channels, which it takes in steps of 64:
//
//     two warpgroups  make the weights of a step dense, in shared memory
//     two warpgroups  multiply 128 outputs each with all rows; their sums stay in registers
//
// A thread of the latter copies codes, scales and x to shared memory, some steps ahead.
//
// WEIGHTS  Thread 8 c + g takes the eight bytes of lane group g (layout.h) of channels c and c + 32 from each
//          subplane, and exchanges their 2-bit fields so that each byte is a whole code q. A weight is then
//              (q - 128 + step) * scale           step: half of what the bits that are not stored count
//          in the type of x, where q - 128 is exact. Outputs of one block of 64 are the rows of a product; the one
//          of matrix tile i and half h of the four tiles in the block becomes row 8 g + 2 (i % 4) + h, so that a
//          thread's eight lie together.
#include <algorithm>
#include <atomic>

#include "arrival.cuh"
#include "device.cuh"
#include "product.h"
#include "ptx.h"
#include "wgmma.cuh"

// On other architectures nothing is left of the kernel, and nobody refers to what it consists of.
#pragma nv_diag_suppress 177

namespace grinqh::cuda {
namespace {

constexpr int kHalf = 256;  // threads that multiply, and as many that make weights dense
constexpr int kThreads = 2 * kHalf;
constexpr int kChannels = kProductChannels;
constexpr int kRowBytes = kChannels * 2;              // of x, or of a channel's weights
constexpr int kBlockRows = 64;                        // outputs of one product
constexpr int kBlocks = kTile / kBlockRows;           // of them in a tile
constexpr int kMostSubs = 4;                          // of 2 bits
constexpr int kPieces = kChannels * 8 / kHalf;        // of codes, that a thread makes dense in a step
constexpr int kRunBytes = kChannels * run_bytes(2);   // of one subplane in a step
constexpr int kScaleBytes = kChannels * kBlocks * 2;  // at most
constexpr int kCodeBytes = kMostSubs * kRunBytes + kScaleBytes;
constexpr int kBlockBytes = kBlockRows * kRowBytes;  // weights of one product's outputs in a step
constexpr int kWeightBytes = kBlocks * kBlockBytes;  // of all
constexpr int kBuffers = 3;                          // of weights
constexpr int kEndBarrier = 1;
constexpr int kMultiplyRegisters = 160, kDenseRegisters = 96;  // of 128 that each thread begins with

struct ProductArgs {
  const std::uint8_t* runs[kMostSubs];
  int channels[kMostSubs];        // 0 of those there are none of; never growing
  int last_plane[kMostSubs + 1];  // of a channel that stores so many subplanes, -1 for none
  int planes;
  const __half* scale;
  const float* row_scale;
  const float* gain;
  int k, steps, blocks;  // blocks with a scale in a tile: 2 or 4
  int slices, row_tiles;
  int whole;  // tiles
  std::int64_t n, m;
  const void *x, *bias, *residual;
  void* y;
  Dtype dtype;
};

// Two numbers of x's type side by side.
template <class Number>
struct Arithmetic;

template <>
struct Arithmetic<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ Pair pair(float value) { return __float2half2_rn(value); }
  static __device__ __forceinline__ Pair pair(__half value) { return __half2half2(value); }
  // q - 128 of bytes 2 i and 2 i + 1: a byte is put into the mantissa of 1024.
  static constexpr unsigned kNumber = 0x64646464;
  template <int i>
  static __device__ __forceinline__ Pair centred(unsigned codes, unsigned number) {
    const unsigned bits = __byte_perm(codes, number, i == 0 ? 0x4140 : 0x4342);
    return __hsub2(reinterpret_cast<const Pair&>(bits), __float2half2_rn(1024 + 128));
  }
};

template <>
struct Arithmetic<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ Pair pair(float value) { return __float2bfloat162_rn(value); }
  static __device__ __forceinline__ Pair pair(__half value) { return __float2bfloat162_rn(__half2float(value)); }
  // The mantissa of 128 has room for seven bits; the eighth decides whether 128 or 256 is taken away.
  static constexpr unsigned kNumber = 0;
  template <int i>
  static __device__ __forceinline__ Pair centred(unsigned codes, unsigned number) {
    const unsigned bytes = __byte_perm(codes, number, i == 0 ? 0x4140 : 0x4342);
    const unsigned low = (bytes & 0x007f007f) | 0x43004300, away = (~bytes & 0x00800080) | 0x43004300;
    return __hsub2(reinterpret_cast<const Pair&>(low), reinterpret_cast<const Pair&>(away));
  }
};

// What a channel's scales are multiplied with, by the number of subplanes it stores.
template <class Number>
struct Factors {
  typename Arithmetic<Number>::Pair gain[kMostSubs + 1], step[kMostSubs + 1];
  unsigned number;  // kNumber, where the assembler does not see that it is constant and spends its moves on others
};

template <class Number, int kRows>
struct Shared {
  // Copies of x arrive some steps after they were asked for, even from L2; the room for more of them is that of codes.
  static constexpr int kInputBuffers = kRows == 64 ? 6 : 4, kCodeBuffers = kRows == 64 ? 4 : 3;
  struct Barriers {
    std::uint64_t codes[kCodeBuffers], input[kInputBuffers];  // copied
    std::uint64_t weights[kBuffers];                          // dense, so that their codes are not needed any more
    std::uint64_t multiplied[kBuffers];                       // so that weights and x are not
  };
  static constexpr int kInputBytes = kRows * kRowBytes;
  static constexpr int kStagedBlock = kBlockRows + 8, kStagedRow = kBlocks * kStagedBlock + 4;  // floats; no conflicts
  static constexpr int kInput = kBuffers * kWeightBytes;
  static constexpr int kCodes = kInput + kInputBuffers * kInputBytes;
  static constexpr int kOperands = kCodes + kCodeBuffers * kCodeBytes;
  static constexpr int kStaged = kRows * kStagedRow * static_cast<int>(sizeof(float));
  static constexpr int kBarriers = kOperands > kStaged ? kOperands : kStaged;
  static constexpr int kFactors = kBarriers + static_cast<int>(sizeof(Barriers));
  static constexpr int kBytes = kFactors + static_cast<int>(sizeof(Factors<Number>)) + 1024;  // to begin aligned
  static_assert(kBytes <= 227 * 1024);
};

// The bits of a where kFrom has ones, else those of b; the compiler would take two instructions.
template <unsigned kFrom>
__device__ __forceinline__ unsigned chosen(unsigned a, unsigned b) {
  unsigned bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(bits) : "r"(a), "r"(b), "n"(kFrom));
  return bits;
}

// Codes of matrix tiles i % 4 = 0..3, one in each byte, from the four subplanes.
__device__ __forceinline__ void exchange_fields(const unsigned (&plane)[kMostSubs], unsigned (&codes)[4]) {
  constexpr unsigned kOdd = 0xcccccccc, kHigh = 0xf0f0f0f0;
  const unsigned even01 = chosen<kOdd>(plane[0] << 2, plane[1]), odd01 = chosen<kOdd>(plane[0], plane[1] >> 2);
  const unsigned even23 = chosen<kOdd>(plane[2] << 2, plane[3]), odd23 = chosen<kOdd>(plane[2], plane[3] >> 2);
  codes[0] = chosen<kHigh>(even01 << 4, even23);
  codes[1] = chosen<kHigh>(odd01 << 4, odd23);
  codes[2] = chosen<kHigh>(even01, even23 >> 4);
  codes[3] = chosen<kHigh>(odd01, odd23 >> 4);
}

// Buffers are used in turn: which one, and how often it was used before.
template <int kCount>
struct Turn {
  int buffer = 0, round = 0;
  __device__ __forceinline__ void next() {
    buffer = buffer == kCount - 1 ? 0 : buffer + 1;
    round += buffer == 0;
  }
};

template <class Number, int kRows>
struct Block {
  using Layout = Shared<Number, kRows>;
  using Math = Arithmetic<Number>;
  using Pair = typename Math::Pair;

  static constexpr int kCodeBuffers = Layout::kCodeBuffers, kInputBuffers = Layout::kInputBuffers;

  const ProductArgs& a;
  std::uint8_t* shared;
  std::uint32_t address;  // of `shared`
  std::int64_t tile, row_tile;
  int slice, slices;  // of the tile's channels
  int begin, end;     // steps

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

  __device__ __forceinline__ std::uint32_t codes_barrier(int i) const { return barriers() + 8 * i; }
  __device__ __forceinline__ std::uint32_t input_barrier(int i) const { return codes_barrier(kCodeBuffers + i); }
  __device__ __forceinline__ std::uint32_t weights_barrier(int i) const { return input_barrier(kInputBuffers + i); }
  __device__ __forceinline__ std::uint32_t multiplied_barrier(int i) const { return weights_barrier(kBuffers + i); }
  __device__ __forceinline__ std::uint32_t barriers() const { return address + Layout::kBarriers; }

  __device__ __forceinline__ void create_barriers() const {
    for (int i = 0; i < kCodeBuffers; ++i) arrival::create(codes_barrier(i), 1);
    for (int i = 0; i < kInputBuffers; ++i) arrival::create(input_barrier(i), 1);
    for (int i = 0; i < kBuffers; ++i) {
      arrival::create(weights_barrier(i), kHalf);
      arrival::create(multiplied_barrier(i), kHalf / 32);
    }
    arrival::created();
  }

  // One thread's.
  __device__ __forceinline__ void copy_codes(int step, int buffer) const {
    if (step >= end) return;
    const std::uint32_t to = address + Layout::kCodes + buffer * kCodeBytes, barrier = codes_barrier(buffer);
    const int first = step * kChannels, scale_bytes = a.blocks * 2;
    int bytes = min(a.k - first, kChannels) * scale_bytes;
    const int scales = bytes;
    int runs[kMostSubs];
#pragma unroll
    for (int s = 0; s < kMostSubs; ++s) {
      runs[s] = max(min(a.channels[s] - first, kChannels), 0) * run_bytes(2);
      bytes += runs[s];
    }
    arrival::arrive_and_expect(barrier, bytes);
#pragma unroll
    for (int s = 0; s < kMostSubs; ++s) {
      const std::uint8_t* from = a.runs[s] + run_offset(tile, first, a.channels[s], run_bytes(2));
      if (runs[s] > 0) arrival::copy(to + s * kRunBytes, from, runs[s], barrier);
    }
    const auto from = reinterpret_cast<const std::uint8_t*>(a.scale) + (tile * a.k + first) * scale_bytes;
    arrival::copy(to + kMostSubs * kRunBytes, from, scales, barrier);
  }
  __device__ __forceinline__ void copy_input(int step, int buffer) const {
    if (step >= end) return;
    arrival::arrive_and_expect(input_barrier(buffer), Layout::kInputBytes);
    const auto from = static_cast<const std::uint8_t*>(a.x) + (row_tile * a.steps + step) * Layout::kInputBytes;
    arrival::copy(address + Layout::kInput + buffer * Layout::kInputBytes, from, Layout::kInputBytes,
                  input_barrier(buffer));
  }

  // Half of the threads: all steps' weights.
  __device__ __forceinline__ void make_dense() const {
    Turn<kBuffers> turn;
    Turn<kCodeBuffers> codes;
    for (int step = begin; step < end; ++step) {
      if (turn.round > 0) arrival::wait(multiplied_barrier(turn.buffer), turn.round - 1);
      arrival::wait(codes_barrier(codes.buffer), codes.round);
      store(step, codes.buffer, turn.buffer);
      wgmma::publish();
      arrival::arrive(weights_barrier(turn.buffer));
      turn.next();
      codes.next();
    }
  }

  __device__ __forceinline__ void store(int step, int code_buffer, int buffer) const {
    const auto& factors = *reinterpret_cast<const Factors<Number>*>(shared + Layout::kFactors);
    const unsigned number = factors.number;
    const int thread = static_cast<int>(threadIdx.x) % kHalf, channel = thread / 8, group = thread % 8;
    const std::uint8_t* from = shared + Layout::kCodes + code_buffer * kCodeBytes;
    std::uint8_t* to = shared + buffer * kWeightBytes + channel * kRowBytes + 16 * wgmma::chunk_of(channel, group);
    const bool all = (step + 1) * kChannels <= a.channels[kMostSubs - 1];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int c = channel + p * (kHalf / 8);
      uint2 codes[kMostSubs];
#pragma unroll
      for (int s = 0; s < kMostSubs; ++s) {
        codes[s] = *reinterpret_cast<const uint2*>(from + s * kRunBytes + c * run_bytes(2) + 8 * group);
      }
      int stored = kMostSubs;
      if (!all) stored = mask_codes(step * kChannels + c, codes);
      uint2 scales;
      if (a.blocks == 4) {
        scales = *reinterpret_cast<const uint2*>(from + kMostSubs * kRunBytes + c * 8);
      } else {
        const unsigned two = *reinterpret_cast<const unsigned*>(from + kMostSubs * kRunBytes + c * 4);
        scales = uint2{__byte_perm(two, 0, 0x1010), __byte_perm(two, 0, 0x3232)};
      }
      if (!all && stored == 0) scales = uint2{};
      const Pair gain = factors.gain[stored], half_step = factors.step[stored];
      const auto scale = reinterpret_cast<const __half*>(&scales);
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        unsigned plane[kMostSubs], whole[4];
#pragma unroll
        for (int s = 0; s < kMostSubs; ++s) plane[s] = word == 0 ? codes[s].x : codes[s].y;
        exchange_fields(plane, whole);
        std::uint8_t* at = to + p * (kHalf / 8) * kRowBytes + 2 * word * kBlockBytes;
        dense<0>(whole, __hmul2(Math::pair(scale[2 * word]), gain), half_step, number, at);
        dense<1>(whole, __hmul2(Math::pair(scale[2 * word + 1]), gain), half_step, number, at + kBlockBytes);
      }
    }
  }

  // Subplanes that a channel does not store were not copied. Returns how many it stores.
  __device__ __forceinline__ int mask_codes(int c, uint2 (&codes)[kMostSubs]) const {
    int stored = 0;
#pragma unroll
    for (int s = 0; s < kMostSubs; ++s) {
      if (c < a.channels[s]) {
        stored = s + 1;
      } else {
        codes[s] = uint2{};
      }
    }
    return stored;
  }

  template <int i>
  static __device__ __forceinline__ void dense(const unsigned (&codes)[4], Pair scale, Pair half_step, unsigned number,
                                               std::uint8_t* to) {
    const Pair middle = __hmul2(scale, half_step);
    Pair weights[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) weights[t] = __hfma2(Math::template centred<i>(codes[t], number), scale, middle);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(weights);
  }

  // The other half, each warpgroup: the sums of two blocks of outputs with all rows.
  __device__ __forceinline__ void multiply(float (&sums)[2][kRows / 2]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i / (kRows / 2)][i % (kRows / 2)] = 0.0f;  // a slice may have no steps
    const std::uint32_t half = static_cast<std::uint32_t>(warp()) / 4 * (2 * kBlockBytes);
    const bool copies = threadIdx.x == 0;
    if (copies) {
      for (int i = 0; i < kCodeBuffers; ++i) copy_codes(begin + i, i);
      ptx::wait_for_previous_kernel();  // which makes x; everything else was there before it
      for (int i = 0; i < kInputBuffers; ++i) copy_input(begin + i, i);
    }
    Turn<kBuffers> turn, before;
    Turn<kInputBuffers> input, input_before;
    Turn<kCodeBuffers> codes;
    for (int step = begin; step < end; ++step) {
      arrival::wait(input_barrier(input.buffer), input.round);
      arrival::wait(weights_barrier(turn.buffer), turn.round);
      const std::uint64_t weights = wgmma::operand(address + turn.buffer * kWeightBytes + half);
      const std::uint64_t x = wgmma::operand(address + Layout::kInput + input.buffer * Layout::kInputBytes);
      wgmma::begin();
#pragma unroll
      for (int part = 0; part < kChannels / 16; ++part) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          wgmma::add_product(sums[b], weights + ((b * kBlockBytes + part * 16 * kRowBytes) >> 4), x + (part * 32 >> 4),
                             1, Number{});
        }
      }
      wgmma::commit();
      if (copies) copy_codes(step + kCodeBuffers, codes.buffer);  // where this step's were
      wgmma::wait<1>();
      if (step > begin && lane() == 0) arrival::arrive(multiplied_barrier(before.buffer));
      const int next_input = step - 1 + kInputBuffers;
      if (copies && step > begin && next_input < end) {
        arrival::wait(multiplied_barrier(before.buffer), before.round);
        copy_input(next_input, input_before.buffer);  // where that of step - 1 was
      }
      __syncwarp();
      before = turn;
      input_before = input;
      turn.next();
      input.next();
      codes.next();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int i = 0; i < kRows; ++i) asm volatile("" : "+f"(sums[i / (kRows / 2)][i % (kRows / 2)])::"memory");
  }

  __device__ __forceinline__ void stage(const float (&sums)[2][kRows / 2]) const {
    float* staged = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float* to = staged + (warp() / 4 * 2 + b) * Layout::kStagedBlock + warp() % 4 * 16 + lane() / 4;
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        to[(8 * (i / 4) + 2 * (lane() % 4) + i % 2) * Layout::kStagedRow + 8 * (i / 2 % 2)] = sums[b][i];
      }
    }
  }

  // The cluster's blocks share the rows out; each thread has eight outputs side by side.
  __device__ __forceinline__ void finish(float reference) const {
    const std::int64_t output = tile * kTile + 8 * lane();
    const int count = static_cast<int>(a.n - output < 8 ? a.n - output : 8);
    if (count <= 0) return;
    float factor[8], bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      factor[i] = i < count ? __ldg(a.row_scale + output + i) * reference : 0.0f;
      bias[i] = a.bias != nullptr && i < count ? load_number(a.bias, output + i, a.dtype) : 0.0f;
    }
    const std::int64_t first_row = row_tile * kRows, left = a.m - first_row;
    const int share = (kRows + slices - 1) / slices, first = slice * share;
    const int last = static_cast<int>(std::min<std::int64_t>(left, min(first + share, kRows)));
#pragma unroll 2
    for (int row = first + warp(); row < last; row += kThreads / 32) {
      // Output 8 (lane % 8) + i of block lane / 8 is row 8 i + lane % 8 of its product.
      float* own =
          reinterpret_cast<float*>(shared) + row * Layout::kStagedRow + lane() / 8 * Layout::kStagedBlock + lane() % 8;
      float sum[8];
      if (slices == 1) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = own[8 * i];
      } else {
        add_up(ptx::shared_address(own), sum);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(sum[i], factor[i], bias[i]);
      write((first_row + row) * a.n + output, sum, count);
    }
  }

  // The sums of all slices, in their order.
  __device__ __forceinline__ void add_up(std::uint32_t own, float (&sum)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
    for (int i = 0; i < slices; ++i) {
      const std::uint32_t from = ptx::of_cluster_block(own, static_cast<unsigned>(i));
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += ptx::load_cluster(from + 8 * j * static_cast<unsigned>(sizeof(float)));
    }
  }

  __device__ __forceinline__ void write(std::int64_t to, float (&value)[8], int count) const {
    const auto residual = static_cast<const Number*>(a.residual);
    Number numbers[8];
    if (count == 8 && a.n % 8 == 0) {
      if (residual != nullptr) {
        *reinterpret_cast<uint4*>(numbers) = *reinterpret_cast<const uint4*>(residual + to);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(Number(value[i])) + static_cast<float>(numbers[i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) numbers[i] = Number(value[i]);
      *reinterpret_cast<uint4*>(static_cast<Number*>(a.y) + to) = *reinterpret_cast<const uint4*>(numbers);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      if (residual != nullptr) value[i] = static_cast<float>(Number(value[i])) + static_cast<float>(residual[to + i]);
      static_cast<Number*>(a.y)[to + i] = Number(value[i]);
    }
  }
};

// Gains relative to that of all planes, which the sums are multiplied with in the end, and half steps.
template <class Number>
__device__ __forceinline__ void make_factors(const ProductArgs& a, Factors<Number>* factors, float reference) {
  const int stored = static_cast<int>(threadIdx.x);
  if (stored > kMostSubs) return;
  const int plane = a.last_plane[stored];
  factors->gain[stored] = Arithmetic<Number>::pair(plane < 0 ? 0.0f : a.gain[plane] / reference);
  factors->step[stored] = Arithmetic<Number>::pair(static_cast<float>(1 << (kCodeBits - 2 * stored)) / 2);
  factors->number = Arithmetic<Number>::kNumber;
}

template <class Number, int kRows>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(const __grid_constant__ ProductArgs a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // nothing runs it elsewhere (product_runs_on)
  using Layout = Shared<Number, kRows>;
  extern __shared__ std::uint8_t dynamic[];
  std::uint8_t* shared = dynamic + (1024 - ptx::shared_address(dynamic) % 1024) % 1024;
  const int index = static_cast<int>(blockIdx.x), cut = index - a.whole;
  const int slices = cut < 0 ? 1 : a.slices, slice = cut < 0 ? 0 : cut % slices;
  const int tile = cut < 0 ? index : a.whole + cut / slices;  // rows change first: they read its codes together
  const int each = (a.steps + slices - 1) / slices, begin = slice * each;
  const Block<Number, kRows> block{
      a,      shared, ptx::shared_address(shared), tile / a.row_tiles, tile % a.row_tiles, slice,
      slices, begin,  min(begin + each, a.steps)};
  const float deepest = a.gain[a.planes - 1], reference = deepest == 0.0f ? 1.0f : deepest;
  make_factors(a, reinterpret_cast<Factors<Number>*>(shared + Layout::kFactors), reference);
  if (threadIdx.x == 0) block.create_barriers();
  ptx::launch_dependents();  // their blocks fit where this kernel's have ended
  __syncthreads();

  if (threadIdx.x >= kHalf) {
    if (kRows == 128) wgmma::give_registers<kDenseRegisters>();
    block.make_dense();
  } else {
    if (kRows == 128) wgmma::take_registers<kMultiplyRegisters>();
    float sums[2][kRows / 2];
    block.multiply(sums);
    ptx::barrier(kEndBarrier, kHalf);  // all products have ended, and with them what makes their weights
    block.stage(sums);
  }
  slices == 1 ? __syncthreads() : ptx::cluster_barrier();
  block.finish(reference / 128);
  if (slices > 1) ptx::cluster_barrier();  // no block ends while others read its sums
#endif
}

// A launch of an instance: `slices` blocks form a cluster.
template <class Number, int kRows>
struct Launch {
  static constexpr auto kKernel = product_kernel<Number, kRows>;
  static constexpr int kBytes = Shared<Number, kRows>::kBytes;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  Launch(int slices, std::int64_t blocks, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(slices);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  static cudaError_t allow_shared_memory() {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
};

template <class Number, int kRows>
Status launch(const ProductArgs& args, std::int64_t blocks, cudaStream_t stream) {
  using Of = Launch<Number, kRows>;
  if (Of::allow_shared_memory() == cudaSuccess) {
    const Of of(args.slices, blocks, stream);
    cudaLaunchKernelEx(&of.config, Of::kKernel, args);
  }
  return launched("product");
}

}  // namespace

Status product(const ProductParams& params, cudaStream_t stream) {
  const PackedWeight& w = params.weight;
  if (w.n == 0 || params.m == 0) return {};
  ProductArgs a{};
  int s = 0;
  a.last_plane[0] = -1;
  for (int plane = 0; plane < w.widths.count; ++plane) {
    const std::int64_t size = tile_count(w.n) * w.channels[plane] * run_bytes(2);
    for (int i = 0; i < sub_count(w.widths.width[plane]); ++i) {
      a.runs[s] = w.plane[plane] + i * size;
      a.channels[s] = static_cast<int>(w.channels[plane]);
      a.last_plane[++s] = plane;
    }
  }
  a.planes = w.widths.count;
  a.scale = reinterpret_cast<const __half*>(w.block_scale);
  a.row_scale = w.row_scale;
  a.gain = w.gain;
  a.k = static_cast<int>(w.k);
  a.steps = static_cast<int>(product_steps(w.k));
  a.blocks = blocks_per_tile(static_cast<int>(w.block));
  a.slices = params.plan.slices;
  a.row_tiles = static_cast<int>((params.m + params.plan.rows - 1) / params.plan.rows);
  a.n = w.n;
  a.m = params.m;
  a.x = params.x;
  a.bias = params.bias;
  a.residual = params.residual;
  a.y = params.y;
  a.dtype = params.dtype;
  const std::int64_t tiles = tile_count(w.n) * a.row_tiles;
  a.whole = static_cast<int>(params.plan.whole);
  const std::int64_t blocks = a.whole + (tiles - a.whole) * a.slices;
  const bool half = params.dtype == Dtype::f16;
  if (params.plan.rows == 128) {
    return half ? launch<__half, 128>(a, blocks, stream) : launch<__nv_bfloat16, 128>(a, blocks, stream);
  }
  return half ? launch<__half, 64>(a, blocks, stream) : launch<__nv_bfloat16, 64>(a, blocks, stream);
}

Status product_room(ProductRoom* room) {
  using Of = Launch<__half, 128>;  // every instance has a multiprocessor to itself
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMostSlices + 1];
  int device = 0;
  cudaError_t failure = cudaGetDevice(&device);
  for (int slices = 1; slices <= kMostSlices && failure == cudaSuccess; ++slices) {
    std::atomic<int>& blocks = known[device % kDevices][slices];
    if (blocks == 0) {
      int clusters = 0;
      const Of of(slices, slices, nullptr);
      failure = Of::allow_shared_memory();
      if (failure == cudaSuccess) failure = cudaOccupancyMaxActiveClusters(&clusters, Of::kKernel, &of.config);
      if (failure == cudaSuccess) blocks = std::max(clusters, 1) * slices;
    }
    room->blocks[slices] = blocks;
  }
  return failure == cudaSuccess ? Status{} : error("grinqh product: %s", cudaGetErrorString(failure));
}

bool product_runs_on([[maybe_unused]] const Gpu& gpu) {
#if defined(GRINQH_SM90A)
  return gpu.capability == 90;
#else
  return false;
#endif
}

}  // namespace grinqh::cuda
