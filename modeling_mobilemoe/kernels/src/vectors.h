// The elementwise arithmetic, written once with GCC's and Clang's vector types. Every instruction-set file includes it
// in an anonymous namespace of its own, so that each copy is compiled for that set and none can replace another.
// Compiled without contraction to fused multiply-add: all copies give the same bits.
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace mobilemoe {
namespace {

// As wide as a register: what sums nothing across lanes uses this.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float f32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// 1.5 * 2^23: adding it rounds a float to the nearest integer, ties to even, and leaves that in the low bits.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4B400000;
constexpr uint32_t kInfinityBits = 0x7F800000;
// Below this a block counts as zero, or 127 / amax would overflow.
constexpr float kSmallest = 0x1p-100f;

template <typename V>
inline V load(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <typename V>
inline void store(void* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

// What is combined across lanes is halved in registers until one lane is left.
inline f32x4 low_half(f32x8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline f32x4 high_half(f32x8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
inline f32x8 low_half(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline f32x8 high_half(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
inline u32x4 low_half(u32x8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline u32x4 high_half(u32x8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
inline u32x8 low_half(u32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline u32x8 high_half(u32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }

template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
inline auto largest_lane(V v) {
  if constexpr (sizeof(V) == 16) {
    v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
  } else {
    return largest_lane(larger(low_half(v), high_half(v)));
  }
}

template <typename V>
inline auto sum_lanes(V v) {
  if constexpr (sizeof(V) == 16) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return v[0] + v[1];
  } else {
    return sum_lanes(low_half(v) + high_half(v));
  }
}

// Of 16 lanes in registers of kLanes each, in the same order.
inline float sum_lanes(f32 (&parts)[16 / kLanes]) {
  for (int half = 8 / kLanes; half; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return sum_lanes(parts[0]);
}

// FP16 -> FP32 without the instruction for it.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  float value;
  if (magnitude >= 0x7C00) {
    const uint32_t bits = sign | kInfinityBits | (magnitude & 0x3FF) << 13;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // Exponent and mantissa moved into place are the value times 2^-112, subnormals included.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof(value));
  value *= 0x1p112f;
  return sign ? -value : value;
}

// Within about 1 ulp (the polynomial is Cephes' expf); NaN stays NaN, the ends saturate at e^-87 and e^88.
template <typename Integers, typename V>
inline V exponential(V x) {
  x = x > 88.0f ? V{} + 88.0f : x;
  x = x < -87.0f ? V{} - 87.0f : x;
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (V)(((Integers)shifted + 127u) << 23);
}

inline f32 exponential(f32 x) { return exponential<u32, f32>(x); }

inline void sigmoid(float* values, int64_t count) {
  float padded[16] = {};
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = count - i < 16 ? count - i : 16;
    std::memcpy(padded, values + i, n * sizeof(float));
    for (int j = 0; j < 16; j += kLanes) store(padded + j, 1.0f / (1.0f + exponential(-load<f32>(padded + j))));
    std::memcpy(values + i, padded, n * sizeof(float));
  }
}

// 16 even and 16 odd outputs -> 32 in order.
inline void interleave(f32x16 even, f32x16 odd, float* out) {
  store(out, __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(out + 16, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

inline void silu_multiply(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32 g = load<f32>(gate + i);
    store(gate + i, g / (1.0f + exponential(-g)) * load<f32>(up + i));
  }
}

inline void add(float* sum, const float* addend, float weight, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(sum + i, load<f32>(sum + i) + load<f32>(addend + i) * weight);
  }
}

// To the nearest BF16, ties to even, left in FP32. A NaN must not round up to infinity.
inline f32x16 round_to_bf16(f32x16 v) {
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  return (f32x16)((bits & 0x7FFFFFFFu) > kInfinityBits ? bits | 0x400000u : rounded);
}

inline void from_bf16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

inline void to_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    // To nearest, ties to even; a NaN must not round up to infinity.
    const bool is_nan = (bits & 0x7FFFFFFF) > kInfinityBits;
    out[i] = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

// Steps that INT8 integers are multiples of, by the largest magnitude's bits, and what to multiply with to get these.
// What is not finite makes the step NaN.
struct Rounding {
  float step, inverse;

  explicit Rounding(uint32_t bits) {
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    const bool is_zero = !(largest > kSmallest), is_finite = bits < kInfinityBits;
    step = !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : largest / 127.0f;
    inverse = is_zero || !is_finite ? 0.0f : 127.0f / largest;
  }
};

struct Rounded {
  float step;
  int32_t offset;  // -8 times the sum of the integers
};

// x [count] -> INT8 of -127 to 127; count is a multiple of 16.
inline Rounded round_to_int8(const float* x, int64_t count, int8_t* out) {
  // Compared as integers, where NaN is larger than infinity and thus never lost.
  u32 largest = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    largest = larger<u32>(largest, (u32)load<f32>(x + i) & 0x7FFFFFFFu);
  }
  const Rounding rounding(largest_lane(largest));
  u32x16 sums = {};
  for (int64_t i = 0; i < count; i += 16) {
    const u32x16 rounded = (u32x16)(load<f32x16>(x + i) * rounding.inverse + kRound);
    sums += rounded;
    // In two steps: GCC 12 would take the lanes one by one.
    store(out + i, __builtin_convertvector(__builtin_convertvector(rounded, u16x16), u8x16));
  }
  const uint32_t sum = sum_lanes(sums);
  return {rounding.step, -kBias * static_cast<int32_t>(sum - static_cast<uint32_t>(count) * kRoundBits)};
}

inline void rms_norm(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  f32x16 squares = {};
  for (int64_t i = 0; i < dim; i += 16) squares += load<f32x16>(x + i) * load<f32x16>(x + i);
  const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(dim) + eps);
  for (int64_t i = 0; i < dim; i += 16) store(out + i, load<f32x16>(x + i) * scale * load<f32x16>(weight + i));
}

// 16 pairs of adjacent channels.
inline f32x16 rotate(float* states, const float* cos, const float* sin, bool round) {
  const f32x16 first = load<f32x16>(states), second = load<f32x16>(states + 16);
  const f32x16 c = load<f32x16>(cos), s = load<f32x16>(sin);
  const f32x16 even =
      __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const f32x16 odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  f32x16 real = even * c - odd * s, imaginary = even * s + odd * c;
  if (round) {
    real = round_to_bf16(real);
    imaginary = round_to_bf16(imaginary);
  }
  interleave(real, imaginary, states);
  return real * real + imaginary * imaginary;
}

inline void rotate_and_normalize(float* states, const float* cos, const float* sin, int64_t num_heads,
                                 int64_t head_dim, float eps, bool round) {
  for (float* head = states; head < states + num_heads * head_dim; head += head_dim) {
    f32x16 squares = {};
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) squares += rotate(head + i, cos + i / 2, sin + i / 2, round);
    if (i < head_dim) {
      float rest[32] = {}, of_cos[16] = {}, of_sin[16] = {};
      const int64_t count = head_dim - i;
      std::memcpy(rest, head + i, count * sizeof(float));
      std::memcpy(of_cos, cos + i / 2, count / 2 * sizeof(float));
      std::memcpy(of_sin, sin + i / 2, count / 2 * sizeof(float));
      squares += rotate(rest, of_cos, of_sin, round);
      std::memcpy(head + i, rest, count * sizeof(float));
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(head_dim) + eps);
    for (i = 0; i < head_dim; ++i) head[i] *= scale;
  }
}

inline void expand_row(const uint8_t* tiles, int row, int64_t num_groups, float* out) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* tile = tiles + g * kGroup * kInputBytes;
    uint16_t half;
    std::memcpy(&half, tile + kGroup * 16 + row * 2, sizeof(half));
    const float step = half_to_float(half);
    for (int k = 0; k < kGroup; ++k) {
      const uint8_t byte = tile[k / kCellBytes * kColumnBytes + row % 16 * kCellBytes + k % kCellBytes];
      out[g * kGroup + k] = static_cast<float>((row < 16 ? byte & 15 : byte >> 4) - kBias) * step;
    }
  }
}

inline void quantize_inputs(const float* x, int num_groups, const LinearInputs& inputs) {
  for (int g = 0; g < num_groups; ++g) {
    const Rounded rounded = round_to_int8(x + g * kGroup, kGroup, inputs.integers + g * kGroup);
    inputs.step[g] = rounded.step;
    inputs.offset[g] = rounded.offset;
  }
}

// 16 sums of every token and expert, in registers of kLanes each.
template <int kTokens, int kExperts>
inline void router_tile(const float* x, int64_t dim, const float* router, int64_t num_experts, float* logits) {
  constexpr int kParts = 16 / kLanes;
  f32 sums[kTokens][kExperts][kParts] = {};
  for (int64_t k = 0; k < dim; k += 16) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int e = 0; e < kExperts; ++e) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          sums[t][e][i] += load<f32>(x + t * dim + k + i * kLanes) * load<f32>(router + e * dim + k + i * kLanes);
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int e = 0; e < kExperts; ++e) logits[t * num_experts + e] = sum_lanes(sums[t][e]);
  }
}

inline void router_logits(const float* x, int64_t num_tokens, int64_t dim, const float* router, int64_t first,
                          int64_t last, int64_t num_experts, float* logits) {
  int64_t t = 0;
  // As many tokens as registers hold the sums of, with 4 experts.
  constexpr int kTokens = kLanes == 16 ? 4 : 1;
  for (; t < num_tokens; t += num_tokens - t >= kTokens ? kTokens : 1) {
    const float* rows = x + t * dim;
    int64_t e = first;
    for (; e < last; e += last - e >= 4 ? 4 : 1) {
      const auto tile = num_tokens - t >= kTokens ? (last - e >= 4 ? router_tile<kTokens, 4> : router_tile<kTokens, 1>)
                                                  : (last - e >= 4 ? router_tile<1, 4> : router_tile<1, 1>);
      tile(rows, dim, router + e * dim, num_experts, logits + t * num_experts + e);
    }
  }
}

}  // namespace
}  // namespace mobilemoe

#include "attention.h"
