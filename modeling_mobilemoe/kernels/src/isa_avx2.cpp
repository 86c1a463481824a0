// AVX2: products of unsigned and signed bytes, added in 16 bits two pairs at a time: 4 * 15 * 127 fits.
#include <immintrin.h>

#include "scales_x86.h"
#include "vectors.h"

namespace mobilemoe {
namespace {

inline __m256i load_groups(const uint8_t* row, bool has_second) {
  const auto* source = reinterpret_cast<const __m128i*>(row);
  return has_second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))
                    : _mm256_zextsi128_si256(_mm_loadu_si128(source));
}

// 4 rows of two groups -> their packed cells: register i has bytes 4i .. 4i + 3 of group g in its 128-bit lane g.
struct Cells {
  __m256i byte[4];
};

inline Cells transpose_rows(const uint8_t* rows, int64_t stride, bool has_second) {
  const __m256i r0 = load_groups(rows, has_second), r1 = load_groups(rows + stride, has_second);
  const __m256i r2 = load_groups(rows + 2 * stride, has_second), r3 = load_groups(rows + 3 * stride, has_second);
  const __m256i low01 = _mm256_unpacklo_epi8(r0, r1), high01 = _mm256_unpackhi_epi8(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi8(r2, r3), high23 = _mm256_unpackhi_epi8(r2, r3);
  return {{_mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
           _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)}};
}

inline __m256i low_nibbles(__m256i packed) {
  return _mm256_xor_si256(_mm256_and_si256(packed, _mm256_set1_epi8(15)), _mm256_set1_epi8(kBias));
}

inline __m256i high_nibbles(__m256i packed) { return low_nibbles(_mm256_srli_epi16(packed, 4)); }

void pack_strip(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride) {
  for (int g = 0; g < strip.num_groups; g += 2) {
    const bool has_second = g + 1 < strip.num_groups;
    for (int k = 0; k < num_rows; k += kCellBytes) {
      const Cells cells = transpose_rows(strip.rows + k * strip.stride + g * 16, strip.stride, has_second);
      auto* first = reinterpret_cast<__m128i*>(panel + g * group_stride + k * kGroup);
      auto* second = reinterpret_cast<__m128i*>(panel + (g + 1) * group_stride + k * kGroup);
      for (int i = 0; i < 4; ++i) {
        const __m256i even = low_nibbles(cells.byte[i]), odd = high_nibbles(cells.byte[i]);
        _mm_storeu_si128(first + i, _mm256_castsi256_si128(even));
        _mm_storeu_si128(first + 4 + i, _mm256_castsi256_si128(odd));
        if (has_second) {
          _mm_storeu_si128(second + i, _mm256_extracti128_si256(even, 1));
          _mm_storeu_si128(second + 4 + i, _mm256_extracti128_si256(odd, 1));
        }
      }
    }
  }
}

inline __m256i add_pairs(__m256i sums, __m256i products) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}

template <int kTokens>
void multiply_tile(const uint8_t* panel, int num_rows, const Activations* activations, int lane, bool accumulate,
                   float* out, int64_t out_stride) {
  __m256i sums[kTokens][4];
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < 4; ++i) sums[t][i] = _mm256_set1_epi32(activations[t].offset[lane]);
  }
  for (int c = 0; c < num_rows / kCellBytes; c += 2) {
    const auto* cells = reinterpret_cast<const __m256i*>(panel + c * kGroup * kCellBytes);
    __m256i x[kTokens][2];
    for (int t = 0; t < kTokens; ++t) {
      const int32_t* pair = activations[t].cells[c / 4][lane] + c % 4;
      x[t][0] = _mm256_set1_epi32(pair[0]);
      x[t][1] = _mm256_set1_epi32(pair[1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i first = _mm256_loadu_si256(cells + i), second = _mm256_loadu_si256(cells + 4 + i);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i products =
            _mm256_add_epi16(_mm256_maddubs_epi16(first, x[t][0]), _mm256_maddubs_epi16(second, x[t][1]));
        sums[t][i] = add_pairs(sums[t][i], products);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    const __m256 step = _mm256_set1_ps(activations[t].step[lane]);
    for (int i = 0; i < 4; ++i) {
      float* target = out + t * out_stride + i * 8;
      __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[t][i]), step);
      if (accumulate) value = _mm256_add_ps(_mm256_loadu_ps(target), value);
      _mm256_storeu_ps(target, value);
    }
  }
}

void multiply_panel(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                    bool accumulate, float* out, int64_t out_stride) {
  for (int t = 0; t < num_tokens; t += 2) {
    const auto multiply = num_tokens - t >= 2 ? multiply_tile<2> : multiply_tile<1>;
    multiply(panel, num_rows, activations + t, lane, accumulate, out + t * out_stride, out_stride);
  }
}

void multiply_strip(const Strip& strip, int num_rows, const Activations& activations, int first_lane,
                    const uint8_t* next, float* out) {
  for (int g = 0; g < strip.num_groups; g += 2) {
    const bool has_second = g + 1 < strip.num_groups;
    const int lane = first_lane + g;
    const auto* offset = activations.offset + lane;
    const auto* step = activations.step + lane;
    const __m256i offsets = _mm256_set_m128i(_mm_set1_epi32(offset[has_second]), _mm_set1_epi32(offset[0]));
    const __m256 steps = _mm256_set_m128(_mm_set1_ps(step[has_second]), _mm_set1_ps(step[0]));
    __m256i even[4], odd[4];
    for (int i = 0; i < 4; ++i) even[i] = odd[i] = offsets;
    for (int k = 0; k < num_rows; k += 16) {
      const __m256i inputs =
          load_groups(reinterpret_cast<const uint8_t*>(activations.cells[k / 16][lane]), has_second);
      const __m256i x[4] = {_mm256_shuffle_epi32(inputs, 0x00), _mm256_shuffle_epi32(inputs, 0x55),
                            _mm256_shuffle_epi32(inputs, 0xAA), _mm256_shuffle_epi32(inputs, 0xFF)};
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int row = k + c * kCellBytes;
        const Cells cells = transpose_rows(strip.rows + row * strip.stride + g * 16, strip.stride, has_second);
        const char* ahead = reinterpret_cast<const char*>(next) + (g / 2 * num_rows + row) * 24;
        _mm_prefetch(ahead, _MM_HINT_T0);
        _mm_prefetch(ahead + 64, _MM_HINT_T0);
        for (int i = 0; i < 4; ++i) {
          even[i] = add_pairs(even[i], _mm256_maddubs_epi16(low_nibbles(cells.byte[i]), x[c]));
          odd[i] = add_pairs(odd[i], _mm256_maddubs_epi16(high_nibbles(cells.byte[i]), x[c]));
        }
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 even_values = _mm256_mul_ps(_mm256_cvtepi32_ps(even[i]), steps);
      const __m256 odd_values = _mm256_mul_ps(_mm256_cvtepi32_ps(odd[i]), steps);
      float* first = out + g * kGroup + i * 4;
      _mm_storeu_ps(first, _mm256_castps256_ps128(even_values));
      _mm_storeu_ps(first + 16, _mm256_castps256_ps128(odd_values));
      if (has_second) {
        _mm_storeu_ps(first + kGroup, _mm256_extractf128_ps(even_values, 1));
        _mm_storeu_ps(first + kGroup + 16, _mm256_extractf128_ps(odd_values, 1));
      }
    }
  }
}

// Scales of 4 rows for up to 8 groups from `begin` on, times the inputs' steps -> [pairs of groups][2 groups][4 rows].
inline void load_steps(const uint16_t* const* scales, int begin, int count, const float* step, __m256i* steps) {
  __m256i rows[4];
  for (int i = 0; i < 4; ++i) {
    if (count == 8) {
      const __m256 of_row = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales[i] + begin)));
      rows[i] = _mm256_castps_si256(_mm256_mul_ps(of_row, _mm256_loadu_ps(step + begin)));
    } else {
      float row[8] = {};
      for (int g = 0; g < count; ++g) row[g] = _cvtsh_ss(scales[i][begin + g]) * step[begin + g];
      rows[i] = _mm256_castps_si256(_mm256_loadu_ps(row));
    }
  }
  const __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(rows[2], rows[3]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
  // Groups i and i + 4.
  const __m256i groups[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                             _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
  for (int i = 0; i < 2; ++i) {
    steps[i] = _mm256_permute2x128_si256(groups[2 * i], groups[2 * i + 1], 0x20);
    steps[2 + i] = _mm256_permute2x128_si256(groups[2 * i], groups[2 * i + 1], 0x31);
  }
}

// 4 rows at a time, whose scales are converted for 8 groups at once. A register's 128-bit lanes are groups.
void multiply_rows(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                   const LinearInputs& inputs, float* out) {
  const int64_t row_bytes = static_cast<int64_t>(num_groups) * 16;
  for (int n = 0; n < num_rows; n += 4) {
    const int rows = num_rows - n < 4 ? num_rows - n : 4;
    const uint8_t* of_row[4];
    const uint16_t* scales[4];
    for (int i = 0; i < 4; ++i) {
      // A missing row repeats the last one; its sum is dropped.
      const int64_t row = n + (i < rows ? i : rows - 1);
      of_row[i] = qweight + row * row_bytes;
      scales[i] = scale + row * num_groups;
    }
    // Of every row, sums 0 and 1, then 2 and 3.
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int begin = 0; begin < num_groups; begin += 8) {
      const int count = num_groups - begin < 8 ? num_groups - begin : 8;
      __m256i steps[4];
      load_steps(scales, begin, count, inputs.step, steps);
      for (int first = begin; first < begin + count; first += kSums) {
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
          const int g = first + 2 * pair;
          if (g >= num_groups) break;
          const bool has_second = g + 1 < num_groups;
          const auto load_inputs = [g](const int8_t* of) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of + g * 16));
          };
          const __m256i even = load_inputs(inputs.even), odd = load_inputs(inputs.odd);
          const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs.offset + g * 4));
          __m256i products[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m256i packed = load_groups(of_row[i] + g * 16, has_second);
            _mm_prefetch(reinterpret_cast<const char*>(of_row[i]) + g * 16 + kAhead, _MM_HINT_T0);
            products[i] = add_pairs(offset, _mm256_add_epi16(_mm256_maddubs_epi16(low_nibbles(packed), even),
                                                             _mm256_maddubs_epi16(high_nibbles(packed), odd)));
          }
          // The sums of the groups' values: lane g has group g of every row.
          const __m256i of_groups = _mm256_hadd_epi32(_mm256_hadd_epi32(products[0], products[1]),
                                                      _mm256_hadd_epi32(products[2], products[3]));
          const __m256 of_steps = _mm256_castsi256_ps(steps[(g - begin) / 2]);
          sums[pair] = _mm256_add_ps(sums[pair], _mm256_mul_ps(_mm256_cvtepi32_ps(of_groups), of_steps));
        }
      }
    }
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(sums[0]), _mm256_extractf128_ps(sums[0], 1));
    total = _mm_add_ps(total, _mm256_castps256_ps128(sums[1]));
    total = _mm_add_ps(total, _mm256_extractf128_ps(sums[1], 1));
    float totals[4];
    _mm_storeu_ps(totals, total);
    std::memcpy(out + n, totals, rows * sizeof(float));
  }
}

// 16 outputs at a time of kTokens tokens, whose sums stay in registers.
template <int kTokens>
void multiply_row_tile(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                       float* out) {
  for (int half = 0; half < 2; ++half) {
    for (int first = 0; first < kSums; ++first) {
      __m256 sums[kTokens][2];
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
      for (int g = first; g < num_groups; g += kSums) {
        __m256i products[kTokens][2];
#pragma GCC unroll 2
        for (int t = 0; t < kTokens; ++t) {
          const int32_t* offset = inputs[t].offset + 4 * g;
          products[t][0] = products[t][1] = _mm256_set1_epi32(offset[0] + offset[1] + offset[2] + offset[3]);
        }
        for (int c = 0; c < 4; ++c) {
          const auto* cells = reinterpret_cast<const __m256i*>(panel + (g * 8 + 2 * c) * 128 + half * 64);
#pragma GCC unroll 2
          for (int t = 0; t < kTokens; ++t) {
            int32_t pair[2];
            std::memcpy(pair, inputs[t].even + g * 16 + c * 4, 4);
            std::memcpy(pair + 1, inputs[t].odd + g * 16 + c * 4, 4);
            const __m256i even = _mm256_set1_epi32(pair[0]), odd = _mm256_set1_epi32(pair[1]);
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              const __m256i of_even = _mm256_maddubs_epi16(_mm256_loadu_si256(cells + i), even);
              const __m256i of_odd = _mm256_maddubs_epi16(_mm256_loadu_si256(cells + 4 + i), odd);
              products[t][i] = add_pairs(products[t][i], _mm256_add_epi16(of_even, of_odd));
            }
          }
        }
#pragma GCC unroll 2
        for (int t = 0; t < kTokens; ++t) {
          const __m256 step = _mm256_set1_ps(inputs[t].step[g]);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const __m256 steps = _mm256_mul_ps(_mm256_loadu_ps(scales + g * kPanelRows + half * 16 + i * 8), step);
            sums[t][i] = _mm256_add_ps(sums[t][i], _mm256_mul_ps(_mm256_cvtepi32_ps(products[t][i]), steps));
          }
        }
      }
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          float* target = out + t * kPanelRows + half * 16 + i * 8;
          _mm256_storeu_ps(target, first > 0 ? _mm256_add_ps(_mm256_loadu_ps(target), sums[t][i]) : sums[t][i]);
        }
      }
    }
  }
}

void multiply_row_panel(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                        int num_tokens, float* out) {
  const auto multiply = num_tokens == 2 ? multiply_row_tile<2> : multiply_row_tile<1>;
  multiply(panel, scales, num_groups, inputs, out);
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

}  // namespace

const Isa kAvx2 = {"avx2",
                   supported,
                   8,
                   load_scales,
                   quantize,
                   pack_strip,
                   multiply_panel,
                   multiply_strip,
                   quantize_inputs,
                   multiply_rows,
                   pack_rows,
                   2,
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
