// What the two Arm files share: NEON with dot products. Included once by each, which compiles it with its own options.
#include <arm_neon.h>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "vectors.h"

namespace mobilemoe {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kColumnVectors = kColumnBytes / kVectorBytes;
constexpr int kArmTokens = 8;  // that a tile of either kind is multiplied with at a time

// Signed bytes 0..15.
inline int8x16_t low_nibbles(uint8x16_t packed) { return vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))); }

inline int8x16_t high_nibbles(uint8x16_t packed) { return vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)); }

inline float32x4_t load_halves(const void* halves) { return vcvt_f32_f16(load<float16x4_t>(halves)); }

inline uint32x4_t magnitudes(float32x4_t v) { return vreinterpretq_u32_f32(vabsq_f32(v)); }

inline uint32_t largest_lane(const uint32x4_t (&v)[4]) {
  return vmaxvq_u32(vmaxq_u32(vmaxq_u32(v[0], v[1]), vmaxq_u32(v[2], v[3])));
}

inline int16x8_t round_values(const float* values, float inverse) {
  const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values), inverse));
  const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + 4), inverse));
  return vuzp1q_s16(vreinterpretq_s16_s32(first), vreinterpretq_s16_s32(second));
}

// `count` values, a multiple of 16 -> INT8. Returns the offset.
inline int32_t round_values(const float* values, int count, float inverse, int8_t* integers) {
  int32x4_t sums = vdupq_n_s32(0);
  for (int k = 0; k < count; k += 16) {
    const int16x8_t first = round_values(values + k, inverse), second = round_values(values + k + 8, inverse);
    const int8x16_t rounded = vuzp1q_s8(vreinterpretq_s8_s16(first), vreinterpretq_s8_s16(second));
    sums = vdotq_s32(sums, rounded, vdupq_n_s8(1));
    vst1q_s8(integers + k, rounded);
  }
  return -kBias * vaddvq_s32(sums);
}

// As in vectors.h.
void quantize_cells(const float* const* x, int num_tokens, const uint16_t* scales, int num_inputs,
                    TileInputs* inputs) {
  float factors[kBlock], scaled[kBlock];
  for (int k = 0; k < num_inputs; k += 4) vst1q_f32(factors + k, load_halves(scales + k));
  for (int t = 0; t < num_tokens; ++t) {
    uint32x4_t largest[4] = {};
    for (int k = 0; k < num_inputs; k += 16) {
      for (int i = 0; i < 4; ++i) {
        const int at = k + 4 * i;
        const float32x4_t product = vmulq_f32(vld1q_f32(x[t] + at), vld1q_f32(factors + at));
        largest[i] = vmaxq_u32(largest[i], magnitudes(product));
        vst1q_f32(scaled + at, product);
      }
    }
    const Rounding rounding(largest_lane(largest));
    inputs[t].step = rounding.step;
    inputs[t].offset = round_values(scaled, num_inputs, rounding.inverse, inputs[t].cells);
  }
}

void quantize_groups(const float* x, int num_groups, const LinearInputs& inputs) {
  for (int g = 0; g < num_groups; ++g) {
    const float* values = x + g * kGroup;
    uint32x4_t largest[4];
    for (int i = 0; i < 4; ++i) {
      largest[i] = vmaxq_u32(magnitudes(vld1q_f32(values + 4 * i)), magnitudes(vld1q_f32(values + 16 + 4 * i)));
    }
    const Rounding rounding(largest_lane(largest));
    inputs.step[g] = rounding.step;
    inputs.offset[g] = round_values(values, kGroup, rounding.inverse, inputs.integers + g * kGroup);
  }
}

// Vectors of a column that are multiplied at a time: with the tokens' sums they fill half of the registers.
constexpr int num_vectors(int num_tokens) { return num_tokens <= 2 ? 4 : num_tokens <= 4 ? 2 : 1; }

// Sums of the products of one token and kVectors vectors of each column: low nibbles, high nibbles.
template <int kVectors>
using Sums = int32x4_t[2][kVectors];

template <int kCell, int kTokens, int kVectors>
inline void add_column(const uint8_t* column, const int8x16_t* x, Sums<kVectors>* sums) {
  for (int i = 0; i < kVectors; ++i) {
    const uint8x16_t packed = vld1q_u8(column + i * kVectorBytes);
    const int8x16_t low = low_nibbles(packed), high = high_nibbles(packed);
    for (int t = 0; t < kTokens; ++t) {
      sums[t][0][i] = vdotq_laneq_s32(sums[t][0][i], low, x[t], kCell);
      sums[t][1][i] = vdotq_laneq_s32(sums[t][1][i], high, x[t], kCell);
    }
  }
}

// sums = offsets + kVectors vectors of each column of a tile times x [kTokens][num_inputs].
template <int kTokens, int kVectors>
__attribute__((always_inline)) inline void dot_products(const uint8_t* columns, int num_inputs, const int8_t* const* x,
                                                        const int32_t* offsets, Sums<kVectors>* sums) {
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kVectors; ++i) sums[t][0][i] = sums[t][1][i] = vdupq_n_s32(offsets[t]);
  }
  int k = 0;
  do {
    int8x16_t cells[kTokens];
    for (int t = 0; t < kTokens; ++t) cells[t] = vld1q_s8(x[t] + k);
    const uint8_t* column = columns + k / kCellBytes * kColumnBytes;
    add_column<0, kTokens, kVectors>(column, cells, sums);
    add_column<1, kTokens, kVectors>(column + kColumnBytes, cells, sums);
    add_column<2, kTokens, kVectors>(column + 2 * kColumnBytes, cells, sums);
    add_column<3, kTokens, kVectors>(column + 3 * kColumnBytes, cells, sums);
    k += 16;
  } while (k < num_inputs);
}

// The same; each instruction set has its own.
template <int kTokens, int kVectors>
void multiply_columns(const uint8_t* columns, int num_inputs, const int8_t* const* x, const int32_t* offsets,
                      Sums<kVectors>* sums);

template <int kTokens>
void multiply_tokens(const uint8_t* tile, int num_inputs, const TileInputs* inputs, bool accumulate, float* out,
                     int64_t out_stride) {
  constexpr int kVectors = num_vectors(kTokens);
  const int8_t* x[kTokens];
  int32_t offsets[kTokens];
  float steps[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = inputs[t].cells;
    offsets[t] = inputs[t].offset;
    steps[t] = inputs[t].step;
  }
  for (int first = 0; first < kColumnVectors; first += kVectors) {
    Sums<kVectors> sums[kTokens];
    multiply_columns<kTokens, kVectors>(tile + first * kVectorBytes, num_inputs, x, offsets, sums);
    for (int t = 0; t < kTokens; ++t) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kVectors; ++i) {
          float* target = out + t * out_stride + half * 16 + 4 * (first + i);
          const float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(sums[t][half][i]), steps[t]);
          vst1q_f32(target, accumulate ? vaddq_f32(vld1q_f32(target), value) : value);
        }
      }
    }
  }
}

void multiply_tile(const uint8_t* tile, int num_inputs, const TileInputs* inputs, int num_tokens, bool accumulate,
                   float* out, int64_t out_stride) {
  constexpr decltype(&multiply_tokens<1>) kTiles[kArmTokens] = {
      multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>, multiply_tokens<4>,
      multiply_tokens<5>, multiply_tokens<6>, multiply_tokens<7>, multiply_tokens<8>};
  kTiles[num_tokens - 1](tile, num_inputs, inputs, accumulate, out, out_stride);
}

// The four sums are in memory, as one token's would fill all registers.
template <int kTokens>
void multiply_row_tile(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, float* out) {
  constexpr int kVectors = num_vectors(kTokens);
  float sums[kSums][kTokens][kGroup] = {};
  for (int g = 0; g < num_groups; ++g) {
    const uint8_t* tile = tiles + g * kGroup * kInputBytes;
    const int8_t* x[kTokens];
    int32_t offsets[kTokens];
    float steps[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      x[t] = inputs[t].integers + g * kGroup;
      offsets[t] = inputs[t].offset[g];
      steps[t] = inputs[t].step[g];
    }
    for (int first = 0; first < kColumnVectors; first += kVectors) {
      Sums<kVectors> products[kTokens];
      multiply_columns<kTokens, kVectors>(tile + first * kVectorBytes, kGroup, x, offsets, products);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kVectors; ++i) {
          const int n = half * 16 + 4 * (first + i);
          const float32x4_t scales = load_halves(tile + kGroup * 16 + n * sizeof(uint16_t));
          for (int t = 0; t < kTokens; ++t) {
            const float32x4_t product = vcvtq_f32_s32(products[t][half][i]);
            float* sum = sums[g % kSums][t] + n;
            vst1q_f32(sum, vaddq_f32(vld1q_f32(sum), vmulq_f32(product, vmulq_n_f32(scales, steps[t]))));
          }
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int n = 0; n < kGroup; ++n) {
      out[t * kGroup + n] = ((sums[0][t][n] + sums[1][t][n]) + sums[2][t][n]) + sums[3][t][n];
    }
  }
}

void multiply_rows(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, int num_tokens, float* out) {
  constexpr decltype(&multiply_row_tile<1>) kTiles[kArmTokens] = {
      multiply_row_tile<1>, multiply_row_tile<2>, multiply_row_tile<3>, multiply_row_tile<4>,
      multiply_row_tile<5>, multiply_row_tile<6>, multiply_row_tile<7>, multiply_row_tile<8>};
  kTiles[num_tokens - 1](tiles, num_groups, inputs, out);
}

#if defined(__APPLE__)
inline bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
inline bool has_dot_products() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_matrix_products() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dot_products() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
inline bool has_matrix_products() { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#endif

void multiply_keys(const int8_t* cells, const AttentionRow* rows, int num_rows, int64_t head_dim, int32_t* dots) {
  for (int r = 0; r < num_rows; ++r) {
    for (int j = 0; j < kKeys; j += 32) {
      int32x4_t sums[8];
      for (int i = 0; i < 8; ++i) sums[i] = vdupq_n_s32(0);
      for (int64_t d = 0; d < head_dim; d += kCellBytes) {
        int32_t cell;
        std::memcpy(&cell, rows[r].integers + d, sizeof(cell));
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(cell));
        const int8_t* keys = cells + (d / kCellBytes * kKeys + j) * kCellBytes;
        for (int i = 0; i < 8; ++i) sums[i] = vdotq_s32(sums[i], vld1q_s8(keys + 16 * i), x);
      }
      for (int i = 0; i < 8; ++i) vst1q_s32(dots + r * kKeys + j + 4 * i, sums[i]);
    }
  }
}

void multiply_values(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_rows, int num_keys,
                     int64_t head_dim, int64_t first, int count, int32_t (*products)[kChannels]) {
  for (int r = 0; r < num_rows; ++r) {
    for (int d = 0; d < count; d += 16) {
      int32x4_t sums[4];
      for (int i = 0; i < 4; ++i) sums[i] = vdupq_n_s32(0);
      for (int j = 0; j < num_keys; j += kCellBytes) {
        int32_t cell;
        std::memcpy(&cell, probabilities[r] + j, sizeof(cell));
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(cell));
        const int8_t* values = cells + (j * head_dim + (first + d) * kCellBytes);
        for (int i = 0; i < 4; ++i) sums[i] = vdotq_s32(sums[i], vld1q_s8(values + 16 * i), x);
      }
      for (int i = 0; i < 4; ++i) vst1q_s32(products[r] + d + 4 * i, sums[i]);
    }
  }
}

}  // namespace
}  // namespace mobilemoe
