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

inline float to_float(const uint16_t* half) {
  __fp16 value;
  std::memcpy(&value, half, sizeof(value));
  return value;
}

void load_scales(const ChunkScales& chunk, int num_rows, float* scales) {
  for (int k = 0; k < num_rows; ++k) {
    float* low = scales + k / 4 * (4 * kChunkGroups) + k % 4;
    float* high = low + 4 * kStripGroups;
    for (int g = 0; g < kStripGroups; ++g) {
      low[4 * g] = g < chunk.num_low ? to_float(chunk.low + k * chunk.stride + g) : 0.0f;
      high[4 * g] = g < chunk.num_high ? to_float(chunk.high + k * chunk.stride + g) : 0.0f;
    }
  }
}

// Signed bytes 0..15: the bias keeps them the same numbers as on x86, where they have to be unsigned.
inline int8x16_t low_nibbles(uint8x16_t packed) {
  return vreinterpretq_s8_u8(veorq_u8(vandq_u8(packed, vdupq_n_u8(15)), vdupq_n_u8(kBias)));
}

inline int8x16_t high_nibbles(uint8x16_t packed) {
  return vreinterpretq_s8_u8(veorq_u8(vshrq_n_u8(packed, 4), vdupq_n_u8(kBias)));
}

// 4 rows of a group -> its packed cells: register i has bytes 4i .. 4i + 3.
inline uint8x16x4_t transpose_rows(const uint8_t* rows, int64_t stride) {
  const uint8x16_t r0 = vld1q_u8(rows), r1 = vld1q_u8(rows + stride);
  const uint8x16_t r2 = vld1q_u8(rows + 2 * stride), r3 = vld1q_u8(rows + 3 * stride);
  const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(r0, r1)), high01 = vreinterpretq_u16_u8(vzip2q_u8(r0, r1));
  const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(r2, r3)), high23 = vreinterpretq_u16_u8(vzip2q_u8(r2, r3));
  return {{vreinterpretq_u8_u16(vzip1q_u16(low01, low23)), vreinterpretq_u8_u16(vzip2q_u16(low01, low23)),
           vreinterpretq_u8_u16(vzip1q_u16(high01, high23)), vreinterpretq_u8_u16(vzip2q_u16(high01, high23))}};
}

inline void finish(int32x4_t sums, float step, bool accumulate, float* out) {
  float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(sums), step);
  if (accumulate) value = vaddq_f32(vld1q_f32(out), value);
  vst1q_f32(out, value);
}

// The four cells of 16 inputs, one after the other.
template <int kCell>
inline int32x4_t add_products(int32x4_t sums, int8x16_t cells, int8x16_t x) {
  return vdotq_laneq_s32(sums, cells, x, kCell);
}

void multiply_strip(const Strip& strip, int num_rows, const Activations& activations, int first_lane,
                    const uint8_t* next, float* out) {
  for (int g = 0; g < strip.num_groups; ++g) {
    const int lane = first_lane + g;
    int32x4_t even[4], odd[4];
    for (int i = 0; i < 4; ++i) even[i] = odd[i] = vdupq_n_s32(activations.offset[lane]);
    const auto add_rows = [&](int row, auto add) {
      const uint8x16x4_t cells = transpose_rows(strip.rows + row * strip.stride + g * 16, strip.stride);
      __builtin_prefetch(next + (g * num_rows + row) * 12, 0, 2);
      for (int i = 0; i < 4; ++i) {
        even[i] = add(even[i], low_nibbles(cells.val[i]));
        odd[i] = add(odd[i], high_nibbles(cells.val[i]));
      }
    };
    for (int k = 0; k < num_rows; k += 16) {
      const int8x16_t x = vreinterpretq_s8_s32(vld1q_s32(activations.cells[k / 16][lane]));
      add_rows(k, [x](int32x4_t sums, int8x16_t cells) { return add_products<0>(sums, cells, x); });
      add_rows(k + 4, [x](int32x4_t sums, int8x16_t cells) { return add_products<1>(sums, cells, x); });
      add_rows(k + 8, [x](int32x4_t sums, int8x16_t cells) { return add_products<2>(sums, cells, x); });
      add_rows(k + 12, [x](int32x4_t sums, int8x16_t cells) { return add_products<3>(sums, cells, x); });
    }
    for (int i = 0; i < 4; ++i) {
      finish(even[i], activations.step[lane], false, out + g * kGroup + 4 * i);
      finish(odd[i], activations.step[lane], false, out + g * kGroup + 16 + 4 * i);
    }
  }
}

void multiply_rows(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                   const LinearInputs& inputs, float* out) {
  for (int n = 0; n < num_rows; ++n) {
    float32x4_t sums = vdupq_n_f32(0);
    for (int g = 0; g < num_groups; g += kSums) {
      const int64_t at = static_cast<int64_t>(n) * num_groups + g;
      const int count = num_groups - g < kSums ? num_groups - g : kSums;
      const auto multiply = [&](int i) {
        const uint8x16_t packed = vld1q_u8(qweight + (at + i) * 16);
        __builtin_prefetch(qweight + (at + i) * 16 + kAhead);
        int32x4_t products = vld1q_s32(inputs.offset + 4 * (g + i));
        products = vdotq_s32(products, low_nibbles(packed), vld1q_s8(inputs.even + (g + i) * 16));
        return vdotq_s32(products, high_nibbles(packed), vld1q_s8(inputs.odd + (g + i) * 16));
      };
      const int32x4_t zero = vdupq_n_s32(0);
      const int32x4_t first = vpaddq_s32(multiply(0), count > 1 ? multiply(1) : zero);
      const int32x4_t second = vpaddq_s32(count > 2 ? multiply(2) : zero, count > 3 ? multiply(3) : zero);
      __fp16 half[kSums] = {};
      std::memcpy(half, scale + at, count * sizeof(uint16_t));
      const float32x4_t steps = vmulq_f32(vcvt_f32_f16(vld1_f16(half)), vld1q_f32(inputs.step + g));
      sums = vaddq_f32(sums, vmulq_f32(vcvtq_f32_s32(vpaddq_s32(first, second)), steps));
    }
    out[n] = vgetq_lane_f32(sums, 0) + vgetq_lane_f32(sums, 1) + vgetq_lane_f32(sums, 2) + vgetq_lane_f32(sums, 3);
  }
}

// 16 outputs at a time for up to 2 tokens.
void multiply_row_panel(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                        int num_tokens, float* out) {
  for (int half = 0; half < 2; ++half) {
    for (int first = 0; first < kSums; ++first) {
      float32x4_t sums[2][4];
      for (int t = 0; t < 2; ++t) {
        for (int i = 0; i < 4; ++i) sums[t][i] = vdupq_n_f32(0);
      }
      for (int g = first; g < num_groups; g += kSums) {
        int32x4_t products[2][4];
        for (int t = 0; t < num_tokens; ++t) {
          const int32x4_t offset = vdupq_n_s32(vaddvq_s32(vld1q_s32(inputs[t].offset + 4 * g)));
          for (int i = 0; i < 4; ++i) products[t][i] = offset;
        }
        for (int c = 0; c < 8; ++c) {
          const auto* cells = reinterpret_cast<const int8_t*>(panel) + (g * 8 + c) * 128 + half * 64;
          for (int t = 0; t < num_tokens; ++t) {
            int32_t cell;
            std::memcpy(&cell, (c % 2 == 0 ? inputs[t].even : inputs[t].odd) + g * 16 + c / 2 * 4, sizeof(cell));
            const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(cell));
            for (int i = 0; i < 4; ++i) products[t][i] = vdotq_s32(products[t][i], vld1q_s8(cells + 16 * i), x);
          }
        }
        for (int t = 0; t < num_tokens; ++t) {
          for (int i = 0; i < 4; ++i) {
            const float32x4_t steps =
                vmulq_n_f32(vld1q_f32(scales + g * kPanelRows + half * 16 + 4 * i), inputs[t].step[g]);
            sums[t][i] = vaddq_f32(sums[t][i], vmulq_f32(vcvtq_f32_s32(products[t][i]), steps));
          }
        }
      }
      for (int t = 0; t < num_tokens; ++t) {
        for (int i = 0; i < 4; ++i) {
          float* target = out + t * kPanelRows + half * 16 + 4 * i;
          vst1q_f32(target, first > 0 ? vaddq_f32(vld1q_f32(target), sums[t][i]) : sums[t][i]);
        }
      }
    }
  }
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

}  // namespace
}  // namespace mobilemoe
