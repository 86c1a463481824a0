// AVX-512 with VNNI: 64 products of unsigned and signed bytes per instruction.
#include <immintrin.h>

#include "scales_x86.h"
#include "vectors.h"

namespace mobilemoe {
namespace {

// sums += cells * x. As assembler, because GCC 12 copies the sums of the intrinsic from register to register, and
// spills.
inline void add_products(__m512i& sums, __m512i cells, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(cells), "v"(x));
}

inline __m512 repeat(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }

// The largest of each 128-bit lane, in all of it; and the sum.
inline __m512i largest_in_lane(__m512i v) {
  v = _mm512_max_epu32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  return _mm512_max_epu32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
}

inline __m512i sum_of_lane(__m512i v) {
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
}

// Four values, one per group -> all of that group's 128-bit lane.
inline __m512i spread(__m128i values) {
  const __m512i index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_epi32(index, _mm512_castsi128_si512(values));
}

// The first lane of each group: 4 of two registers -> 8.
inline __m256i gather_groups(__m512i low, __m512i high) {
  const __m512i index = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  return _mm512_castsi512_si256(_mm512_permutex2var_epi32(low, index, high));
}

// As in vectors.h. A 128-bit lane is a group, in which four conversions of 4 rows pack to 16 bytes. Loading limits it,
// so the scales serve two tokens at a time. All loops but those over rows are unrolled, to keep sums in registers.
template <int kTokens>
void quantize_tile(const float* const* x, const float* scales, int num_rows, Activations* activations) {
  const __m512i no_sign = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest[kTokens][2];
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) largest[t][0] = largest[t][1] = _mm512_setzero_si512();
  for (int k = 0; k < num_rows; k += kCellBytes) {
    const __m512 low = _mm512_loadu_ps(scales + k * kChunkGroups);
    const __m512 high = _mm512_loadu_ps(scales + k * kChunkGroups + 16);
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      const __m512 magnitude = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(repeat(x[t] + k)), no_sign));
      largest[t][0] = _mm512_max_epu32(largest[t][0], _mm512_castps_si512(_mm512_mul_ps(magnitude, low)));
      largest[t][1] = _mm512_max_epu32(largest[t][1], _mm512_castps_si512(_mm512_mul_ps(magnitude, high)));
    }
  }
  __m512 inverse[kTokens][2];
  __m512i sums[kTokens][2];
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
    const __m256i bits = gather_groups(largest_in_lane(largest[t][0]), largest_in_lane(largest[t][1]));
    const __m256 amax = _mm256_castsi256_ps(bits);
    const __mmask8 is_finite = _mm256_cmplt_epu32_mask(bits, _mm256_set1_epi32(kInfinityBits));
    const __mmask8 is_used = is_finite & _mm256_cmp_ps_mask(amax, _mm256_set1_ps(kSmallest), _CMP_GT_OQ);
    const __m256 of_groups = _mm256_maskz_div_ps(is_used, _mm256_set1_ps(127.0f), amax);
    const __m256 step = _mm256_maskz_div_ps(is_used, amax, _mm256_set1_ps(127.0f));
    _mm256_storeu_ps(activations[t].step, _mm256_mask_blend_ps(is_finite, _mm256_set1_ps(__builtin_nanf("")), step));
    inverse[t][0] = _mm512_castsi512_ps(spread(_mm_castps_si128(_mm256_castps256_ps128(of_groups))));
    inverse[t][1] = _mm512_castsi512_ps(spread(_mm_castps_si128(_mm256_extractf128_ps(of_groups, 1))));
    sums[t][0] = sums[t][1] = _mm512_setzero_si512();
  }
  for (int k = 0; k < num_rows; k += 16) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 of_rows[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        of_rows[c] = _mm512_loadu_ps(scales + (k + c * kCellBytes) * kChunkGroups + half * 16);
      }
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        __m512i rounded[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const __m512 scaled = _mm512_mul_ps(repeat(x[t] + k + c * kCellBytes), of_rows[c]);
          rounded[c] = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, inverse[t][half]));
        }
        const __m512i cells =
            _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), _mm512_packs_epi32(rounded[2], rounded[3]));
        add_products(sums[t][half], _mm512_set1_epi8(1), cells);
        _mm512_store_si512(activations[t].cells[k / 16][half * kStripGroups], cells);
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
    const __m256i sum = gather_groups(sum_of_lane(sums[t][0]), sum_of_lane(sums[t][1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(activations[t].offset),
                        _mm256_mullo_epi32(sum, _mm256_set1_epi32(-kBias)));
  }
}

void quantize_lanes(const float* const* x, int num_tokens, const float* scales, int num_rows,
                    Activations* activations) {
  int t = 0;
  for (; t + 1 < num_tokens; t += 2) quantize_tile<2>(x + t, scales, num_rows, activations + t);
  if (t < num_tokens) quantize_tile<1>(x + t, scales, num_rows, activations + t);
}

// 4 rows of a strip -> packed cells of its groups: register i has bytes 4i .. 4i + 3 of group g in its 128-bit lane g.
struct Cells {
  __m512i byte[4];
};

inline Cells transpose_rows(const Strip& strip, int row, __mmask64 mask) {
  const uint8_t* rows = strip.rows + row * strip.stride;
  const __m512i r0 = _mm512_maskz_loadu_epi8(mask, rows);
  const __m512i r1 = _mm512_maskz_loadu_epi8(mask, rows + strip.stride);
  const __m512i r2 = _mm512_maskz_loadu_epi8(mask, rows + 2 * strip.stride);
  const __m512i r3 = _mm512_maskz_loadu_epi8(mask, rows + 3 * strip.stride);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  return {{_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
           _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)}};
}

inline __mmask64 strip_mask(const Strip& strip) { return ~0ull >> (64 - 16 * strip.num_groups); }

inline __m512i low_nibbles(__m512i packed) {
  // (packed & 15) ^ 8 in one instruction: the truth table of (a & b) ^ c.
  return _mm512_ternarylogic_epi32(packed, _mm512_set1_epi8(15), _mm512_set1_epi8(kBias), 0x6A);
}

inline __m512i high_nibbles(__m512i packed) { return low_nibbles(_mm512_srli_epi16(packed, 4)); }

// Four registers as a 4 x 4 matrix of 128-bit lanes, transposed.
inline void transpose_lanes(__m512i v[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

void pack_strip(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride) {
  const __mmask64 mask = strip_mask(strip);
  for (int k = 0; k < num_rows; k += kCellBytes) {
    Cells cells = transpose_rows(strip, k, mask);
    transpose_lanes(cells.byte);
    for (int g = 0; g < strip.num_groups; ++g) {
      uint8_t* target = panel + g * group_stride + k * kGroup;
      _mm512_storeu_si512(target, low_nibbles(cells.byte[g]));
      _mm512_storeu_si512(target + 64, high_nibbles(cells.byte[g]));
    }
  }
}

inline void finish(__m512i sums, float step, bool accumulate, float* out) {
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(step));
  if (accumulate) value = _mm512_add_ps(_mm512_loadu_ps(out), value);
  _mm512_storeu_ps(out, value);
}

template <int kTokens>
void multiply_tile(const uint8_t* panel, int num_rows, const Activations* activations, int lane, bool accumulate,
                   float* out, int64_t out_stride) {
  __m512i even[kTokens], odd[kTokens];
  // Every loop over tokens is unrolled, or the sums would live in memory instead of registers.
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) even[t] = odd[t] = _mm512_set1_epi32(activations[t].offset[lane]);
  for (int c = 0; c < num_rows / kCellBytes; ++c) {
    const __m512i even_cells = _mm512_loadu_si512(panel + c * 128);
    const __m512i odd_cells = _mm512_loadu_si512(panel + c * 128 + 64);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512i x = _mm512_set1_epi32(activations[t].cells[c / 4][lane][c % 4]);
      add_products(even[t], even_cells, x);
      add_products(odd[t], odd_cells, x);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    finish(even[t], activations[t].step[lane], accumulate, out + t * out_stride);
    finish(odd[t], activations[t].step[lane], accumulate, out + t * out_stride + 16);
  }
}

void multiply_panel(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                    bool accumulate, float* out, int64_t out_stride) {
  constexpr decltype(&multiply_tile<1>) kTiles[kMaxTile] = {
      multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
      multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};
  kTiles[num_tokens - 1](panel, num_rows, activations, lane, accumulate, out, out_stride);
}

void multiply_strip(const Strip& strip, int num_rows, const Activations& activations, int first_lane,
                    const uint8_t* next, float* out) {
  const __mmask64 mask = strip_mask(strip);
  const auto* offset = reinterpret_cast<const __m128i*>(activations.offset + first_lane);
  __m512i even[4], odd[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) even[i] = odd[i] = spread(_mm_loadu_si128(offset));
  for (int k = 0; k < num_rows; k += 16) {
    const __m512i inputs = _mm512_loadu_si512(activations.cells[k / 16][first_lane]);
    const __m512i x[4] = {_mm512_shuffle_epi32(inputs, _MM_PERM_AAAA), _mm512_shuffle_epi32(inputs, _MM_PERM_BBBB),
                          _mm512_shuffle_epi32(inputs, _MM_PERM_CCCC), _mm512_shuffle_epi32(inputs, _MM_PERM_DDDD)};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const int row = k + c * kCellBytes;
      const Cells cells = transpose_rows(strip, row, mask);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i < 3) _mm_prefetch(reinterpret_cast<const char*>(next) + (row / 4 * 3 + i) * 64, _MM_HINT_T0);
        add_products(even[i], low_nibbles(cells.byte[i]), x[c]);
        add_products(odd[i], high_nibbles(cells.byte[i]), x[c]);
      }
    }
  }
  transpose_lanes(even);
  transpose_lanes(odd);
#pragma GCC unroll 4
  for (int g = 0; g < kStripGroups; ++g) {
    if (g == strip.num_groups) break;
    finish(even[g], activations.step[first_lane + g], false, out + g * kGroup);
    finish(odd[g], activations.step[first_lane + g], false, out + g * kGroup + 16);
  }
}

// 4 rows of 4 groups, a group's 4 values in a 128-bit lane -> their sums: lane g has group g of every row.
inline __m512i sum_groups(const __m512i* rows) {
  const auto add_halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i first = add_halves(rows[0], rows[1]), second = add_halves(rows[2], rows[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}

// Floats of 4 rows of 16 groups -> register i has groups 4i .. 4i + 3 in its lanes, each of every row.
inline void transpose_groups(const __m512* rows, __m512i* groups) {
  __m512i bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = _mm512_castps_si512(rows[i]);
  const __m512i low01 = _mm512_unpacklo_epi32(bits[0], bits[1]), high01 = _mm512_unpackhi_epi32(bits[0], bits[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(bits[2], bits[3]), high23 = _mm512_unpackhi_epi32(bits[2], bits[3]);
  groups[0] = _mm512_unpacklo_epi64(low01, low23);
  groups[1] = _mm512_unpackhi_epi64(low01, low23);
  groups[2] = _mm512_unpacklo_epi64(high01, high23);
  groups[3] = _mm512_unpackhi_epi64(high01, high23);
  transpose_lanes(groups);
}

// 4 rows at a time, whose scales are converted for 16 groups at once. A register's 128-bit lanes are groups.
void multiply_rows(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                   const LinearInputs& inputs, float* out) {
  const int64_t row_bytes = static_cast<int64_t>(num_groups) * 16;
  // Whole blocks of 4 rows ahead, so that lines arrive in the order in which they are read.
  const int64_t ahead = ceil_div(kAhead, 4 * row_bytes) * 4 * row_bytes;
  for (int n = 0; n < num_rows; n += 4) {
    const int rows = num_rows - n < 4 ? num_rows - n : 4;
    const uint8_t* of_row[4];
    const uint16_t* scales[4];
    __m512 sums = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // A missing row repeats the last one; its sum is dropped.
      const int64_t row = n + (i < rows ? i : rows - 1);
      of_row[i] = qweight + row * row_bytes;
      scales[i] = scale + row * num_groups;
    }
    for (int begin = 0; begin < num_groups; begin += 16) {
      const int count = num_groups - begin < 16 ? num_groups - begin : 16;
      const auto used = static_cast<__mmask16>((1u << count) - 1);
      const __m512 step = _mm512_maskz_loadu_ps(used, inputs.step + begin);
      __m512 of_rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 converted = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(used, scales[i] + begin));
        of_rows[i] = _mm512_mul_ps(converted, step);
        _mm_prefetch(reinterpret_cast<const char*>(scales[i] + begin) + ahead / 8, _MM_HINT_T0);
      }
      __m512i steps[4];
      transpose_groups(of_rows, steps);
      for (int g = begin; g < begin + count; g += kSums) {
        const __mmask64 bytes = begin + count - g < 4 ? ~0ull >> (64 - 16 * (begin + count - g)) : ~0ull;
        const __m512i even = _mm512_loadu_si512(inputs.even + g * 16), odd = _mm512_loadu_si512(inputs.odd + g * 16);
        const __m512i offset = _mm512_loadu_si512(inputs.offset + g * 4);
        __m512i products[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const uint8_t* at = of_row[i] + g * 16;
          const __m512i packed = _mm512_maskz_loadu_epi8(bytes, at);
          _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T0);
          products[i] = offset;
          add_products(products[i], low_nibbles(packed), even);
          add_products(products[i], high_nibbles(packed), odd);
        }
        const __m512 of_groups = _mm512_castsi512_ps(steps[(g - begin) / kSums]);
        sums = _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(sum_groups(products)), of_groups));
      }
    }
    __m128 total = _mm512_castps512_ps128(sums);
    total = _mm_add_ps(total, _mm512_extractf32x4_ps(sums, 1));
    total = _mm_add_ps(total, _mm512_extractf32x4_ps(sums, 2));
    total = _mm_add_ps(total, _mm512_extractf32x4_ps(sums, 3));
    _mm_mask_storeu_ps(out + n, (1 << rows) - 1, total);
  }
}

template <int kTokens>
void multiply_row_tile(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                       float* out) {
  for (int begin = 0; begin < kSums; ++begin) {
    __m512 sums[kTokens][2];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int g = begin; g < num_groups; g += kSums) {
      __m512i products[kTokens][2];
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const int32_t* offset = inputs[t].offset + 4 * g;
        products[t][0] = products[t][1] = _mm512_set1_epi32(offset[0] + offset[1] + offset[2] + offset[3]);
      }
      for (int c = 0; c < 8; ++c) {
        const uint8_t* cells = panel + (g * 8 + c) * 128;
        const __m512i first = _mm512_loadu_si512(cells), second = _mm512_loadu_si512(cells + 64);
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
          int32_t cell;
          std::memcpy(&cell, (c % 2 == 0 ? inputs[t].even : inputs[t].odd) + g * 16 + c / 2 * 4, sizeof(cell));
          const __m512i x = _mm512_set1_epi32(cell);
          add_products(products[t][0], first, x);
          add_products(products[t][1], second, x);
        }
      }
      const __m512 first = _mm512_loadu_ps(scales + g * 32), second = _mm512_loadu_ps(scales + g * 32 + 16);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m512 step = _mm512_set1_ps(inputs[t].step[g]);
        sums[t][0] =
            _mm512_add_ps(sums[t][0], _mm512_mul_ps(_mm512_cvtepi32_ps(products[t][0]), _mm512_mul_ps(first, step)));
        sums[t][1] =
            _mm512_add_ps(sums[t][1], _mm512_mul_ps(_mm512_cvtepi32_ps(products[t][1]), _mm512_mul_ps(second, step)));
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < 2; ++i) {
        float* target = out + t * kPanelRows + i * 16;
        _mm512_storeu_ps(target, begin > 0 ? _mm512_add_ps(_mm512_loadu_ps(target), sums[t][i]) : sums[t][i]);
      }
    }
  }
}

void multiply_row_panel(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                        int num_tokens, float* out) {
  constexpr decltype(&multiply_row_tile<1>) kTiles[kMaxLinearTile] = {multiply_row_tile<1>, multiply_row_tile<2>,
                                                                      multiply_row_tile<3>, multiply_row_tile<4>,
                                                                      multiply_row_tile<5>, multiply_row_tile<6>};
  kTiles[num_tokens - 1](panel, scales, num_groups, inputs, out);
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Isa kAvx512 = {"avx512",
                     supported,
                     kMaxTile,
                     load_scales,
                     quantize_lanes,
                     pack_strip,
                     multiply_panel,
                     multiply_strip,
                     quantize_inputs,
                     multiply_rows,
                     pack_rows,
                     kMaxLinearTile,
                     multiply_row_panel,
                     router_logits,
                     sigmoid,
                     swiglu,
                     add,
                     in_order,
                     silu_multiply,
                     rms_norm,
                     rotate_and_normalize,
                     transpose_keys,
                     attend,
                     expand_row,
                     from_bf16,
                     to_bf16};

}  // namespace mobilemoe
