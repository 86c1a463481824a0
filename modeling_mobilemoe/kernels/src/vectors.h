// The elementwise arithmetic, written once with GCC's and Clang's vector types. Every instruction-set file includes it
// in an anonymous namespace of its own, so that each copy is compiled for that set and none can replace another.
// Compiled without contraction to fused multiply-add: all copies give the same bits.
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace mobilemoe {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
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

// FP16 -> FP32 without the instruction for it.
[[maybe_unused]] inline float half_to_float(uint16_t half) {
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
inline f32x16 exponential(f32x16 x) {
  x = x > 88.0f ? f32x16{} + 88.0f : x;
  x = x < -87.0f ? f32x16{} - 87.0f : x;
  const f32x16 shifted = x * 1.44269504088896341f + kRound;
  const f32x16 n = shifted - kRound;
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (f32x16)(((u32x16)shifted + 127u) << 23);
}

inline void sigmoid(float* values, int64_t count) {
  float padded[16] = {};
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = count - i < 16 ? count - i : 16;
    std::memcpy(padded, values + i, n * sizeof(float));
    store(padded, 1.0f / (1.0f + exponential(-load<f32x16>(padded))));
    std::memcpy(values + i, padded, n * sizeof(float));
  }
}

// 16 even and 16 odd outputs -> 32 in order.
inline void interleave(f32x16 even, f32x16 odd, float* out) {
  store(out, __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(out + 16, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

inline f32x16 silu_times(const float* gate, const float* up) {
  const f32x16 g = load<f32x16>(gate);
  return g / (1.0f + exponential(-g)) * load<f32x16>(up);
}

inline void silu_multiply(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) store(gate + i, silu_times(gate + i, up + i));
}

inline void swiglu(const float* gate, const float* up, int64_t count, float* mid) {
  for (int64_t i = 0; i < count; i += kGroup) {
    interleave(silu_times(gate + i, up + i), silu_times(gate + i + 16, up + i + 16), mid + i);
  }
}

inline void in_order(const float* accumulators, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kGroup) {
    interleave(load<f32x16>(accumulators + i), load<f32x16>(accumulators + i + 16), out + i);
  }
}

inline void add(float* sum, const float* addend, float weight, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    store(sum + i, load<f32x16>(sum + i) + load<f32x16>(addend + i) * weight);
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

// What is not finite makes that group's step NaN.
inline void quantize_token(const float* x, const float* scales, int num_rows, Activations* activations) {
  const auto repeat = [](f32x4 v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  };
  for (int half = 0; half < 2; ++half) {
    const float* of_half = scales + half * 16;
    // Lanes are (group, row). Compared as integers, where NaN is larger than infinity and thus never lost.
    u32x16 largest = {};
    for (int k = 0; k < num_rows; k += kCellBytes) {
      const u32x16 magnitude =
          (u32x16)(repeat(load<f32x4>(x + k)) * load<f32x16>(of_half + k * kChunkGroups)) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    float inverse[16];
    for (int g = 0; g < kStripGroups; ++g) {
      uint32_t bits = largest[4 * g];
      for (int row = 1; row < 4; ++row) bits = largest[4 * g + row] > bits ? largest[4 * g + row] : bits;
      float amax;
      std::memcpy(&amax, &bits, sizeof(amax));
      const bool is_zero = !(amax > kSmallest), is_finite = bits < kInfinityBits;
      activations->step[half * kStripGroups + g] = !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : amax / 127.0f;
      for (int row = 0; row < 4; ++row) inverse[4 * g + row] = is_zero || !is_finite ? 0.0f : 127.0f / amax;
    }
    u32x16 sums = {};
    for (int k = 0; k < num_rows; k += kCellBytes) {
      const f32x16 scaled = repeat(load<f32x4>(x + k)) * load<f32x16>(of_half + k * kChunkGroups);
      const u32x16 rounded = (u32x16)(scaled * load<f32x16>(inverse) + kRound);
      sums += rounded;
      int32_t cells[kStripGroups];
      store(cells, __builtin_convertvector(rounded, u8x16));
      for (int g = 0; g < kStripGroups; ++g) {
        activations->cells[k / 16][half * kStripGroups + g][k / kCellBytes % 4] = cells[g];
      }
    }
    for (int g = 0; g < kStripGroups; ++g) {
      const uint32_t sum = sums[4 * g] + sums[4 * g + 1] + sums[4 * g + 2] + sums[4 * g + 3];
      activations->offset[half * kStripGroups + g] =
          -kBias * static_cast<int32_t>(sum - static_cast<uint32_t>(num_rows) * kRoundBits);
    }
  }
}

[[maybe_unused]] inline void quantize(const float* const* x, int num_tokens, const float* scales, int num_rows,
                                      Activations* activations) {
  for (int t = 0; t < num_tokens; ++t) quantize_token(x[t], scales, num_rows, activations + t);
}

inline float sum_lanes(const float* source) {
  float lanes[16];
  std::memcpy(lanes, source, sizeof(lanes));
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

[[maybe_unused]] inline float sum_lanes(f32x16 v) {
  float lanes[16];
  store(lanes, v);
  return sum_lanes(lanes);
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

inline void expand_row(const uint8_t* qweight, const uint16_t* scale, int64_t num_groups, float* out) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const float step = half_to_float(scale[g]);
    for (int64_t j = 0; j < kGroup / 2; ++j) {
      const uint8_t byte = qweight[g * (kGroup / 2) + j];
      out[g * kGroup + 2 * j] = static_cast<float>(static_cast<int>((byte & 15) ^ kBias) - kBias) * step;
      out[g * kGroup + 2 * j + 1] = static_cast<float>(static_cast<int>((byte >> 4) ^ kBias) - kBias) * step;
    }
  }
}

inline void quantize_inputs(const float* x, int num_groups, const LinearInputs& inputs) {
  for (int g = 0; g < num_groups; ++g) {
    const f32x16 first = load<f32x16>(x + g * kGroup), second = load<f32x16>(x + g * kGroup + 16);
    const u32x16 magnitude = (u32x16)first & 0x7FFFFFFFu, other = (u32x16)second & 0x7FFFFFFFu;
    uint32_t lanes[16], bits = 0;
    store(lanes, magnitude > other ? magnitude : other);
    for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
    float amax;
    std::memcpy(&amax, &bits, sizeof(amax));
    const bool is_zero = !(amax > kSmallest), is_finite = bits < kInfinityBits;
    const float inverse = is_zero || !is_finite ? 0.0f : 127.0f / amax;
    inputs.step[g] = !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : amax / 127.0f;
    int8_t rounded[kGroup];
    store(rounded, __builtin_convertvector((u32x16)(first * inverse + kRound), u8x16));
    store(rounded + 16, __builtin_convertvector((u32x16)(second * inverse + kRound), u8x16));
    int8_t *even = inputs.even + g * 16, *odd = inputs.odd + g * 16;
    for (int j = 0; j < 16; ++j) {
      even[j] = rounded[2 * j];
      odd[j] = rounded[2 * j + 1];
    }
    for (int c = 0; c < 4; ++c) {
      int32_t sum = 0;
      for (int j = 4 * c; j < 4 * c + 4; ++j) sum += even[j] + odd[j];
      inputs.offset[4 * g + c] = -kBias * sum;
    }
  }
}

// Row by row: 16 bytes of a group hold 4 cells of even inputs and 4 of odd ones.
[[maybe_unused]] inline void pack_rows(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                                       uint8_t* panel, float* scales) {
  for (int g = 0; g < num_groups; ++g) {
    for (int n = 0; n < kPanelRows; ++n) {
      uint8_t* cells = panel + (g * 8 * kPanelRows + n) * kCellBytes;
      scales[g * kPanelRows + n] = n < num_rows ? half_to_float(scale[n * num_groups + g]) : 0.0f;
      for (int c = 0; c < 4; ++c) {
        uint32_t packed = 0;
        if (n < num_rows) std::memcpy(&packed, qweight + (n * num_groups + g) * 16 + 4 * c, sizeof(packed));
        const uint32_t even = (packed & 0x0F0F0F0Fu) ^ 0x08080808u, odd = (packed >> 4 & 0x0F0F0F0Fu) ^ 0x08080808u;
        std::memcpy(cells + 2 * c * kPanelRows * kCellBytes, &even, sizeof(even));
        std::memcpy(cells + (2 * c + 1) * kPanelRows * kCellBytes, &odd, sizeof(odd));
      }
    }
  }
}

template <int kTokens, int kExperts>
inline void router_tile(const float* x, int64_t dim, const float* router, int64_t num_experts, float* logits) {
  f32x16 sums[kTokens][kExperts] = {};
  for (int64_t k = 0; k < dim; k += 16) {
    for (int t = 0; t < kTokens; ++t) {
      for (int e = 0; e < kExperts; ++e) {
        sums[t][e] += load<f32x16>(x + t * dim + k) * load<f32x16>(router + e * dim + k);
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
  for (; t < num_tokens; t += num_tokens - t >= 4 ? 4 : 1) {
    const float* rows = x + t * dim;
    int64_t e = first;
    for (; e < last; e += last - e >= 4 ? 4 : 1) {
      const auto tile = num_tokens - t >= 4 ? (last - e >= 4 ? router_tile<4, 4> : router_tile<4, 1>)
                                            : (last - e >= 4 ? router_tile<1, 4> : router_tile<1, 1>);
      tile(rows, dim, router + e * dim, num_experts, logits + t * num_experts + e);
    }
  }
}

}  // namespace
}  // namespace mobilemoe

#include "attention.h"
