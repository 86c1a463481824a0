// AVX2: products of unsigned and signed bytes, added in 16 bits two pairs at a time: 4 * 15 * 127 fits.
#include <immintrin.h>

#include "vectors.h"

namespace mobilemoe {
namespace {

constexpr int kTokensAtOnce = 4;

inline __m256i add_pairs(__m256i sums, __m256i products) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}

inline __m256i repeat_cell(const int8_t* cell) {
  int32_t value;
  std::memcpy(&value, cell, sizeof(value));
  return _mm256_set1_epi32(value);
}

inline __m256 load_halves(const void* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves)));
}

// Packing 32 numbers to bytes leaves cell 2i + j of them at place 4j + i.
inline int place(int cell) { return cell / 8 * 8 + cell % 2 * 4 + cell / 2 % 4; }

inline __m256i pack(const __m256i* rounded) {
  return _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
}

inline __m256i magnitude(__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)); }

inline uint32_t largest_of(__m256i v) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

inline int32_t sum_of(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtsi128_si32(half);
}

// As in vectors.h.
void quantize_cells(const float* const* x, int num_tokens, const uint16_t* scales, int num_inputs,
                    TileInputs* inputs) {
  alignas(32) float factors[kBlock], scaled[kBlock];
  for (int k = 0; k < num_inputs; k += 8) _mm256_store_ps(factors + k, load_halves(scales + k));
  for (int t = 0; t < num_tokens; ++t) {
    __m256i largest = _mm256_setzero_si256();
    for (int k = 0; k < num_inputs; k += 8) {
      const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x[t] + k), _mm256_load_ps(factors + k));
      _mm256_store_ps(scaled + k, value);
      largest = _mm256_max_epu32(largest, magnitude(value));
    }
    const Rounding rounding(largest_of(largest));
    const __m256 inverse = _mm256_set1_ps(rounding.inverse);
    __m256i sums = _mm256_setzero_si256();
    for (int k = 0; k < num_inputs; k += 32) {
      __m256i rounded[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(scaled + k + 8 * i), inverse));
      }
      const __m256i cells = pack(rounded);
      sums = add_pairs(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), cells));
      _mm256_store_si256(reinterpret_cast<__m256i*>(inputs[t].cells + k), cells);
    }
    inputs[t].step = rounding.step;
    inputs[t].offset = -kBias * sum_of(sums);
  }
}

// Products of half of a column, whose low and high nibbles are 8 outputs each, with some tokens' cells, for 32 inputs.
// In 16 bits they are 8 times two products of at most 15 * 127, which fits.
template <int kTokens, typename Cell>
inline void multiply_columns(const uint8_t* columns, const Cell& cell, __m256i (*products)[2]) {
#pragma GCC unroll 8
  for (int c = 0; c < kGroup / kCellBytes; ++c) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + c * kColumnBytes));
    const __m256i low = _mm256_and_si256(packed, _mm256_set1_epi8(15));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256i x = repeat_cell(cell(t, c));
      const __m256i first = _mm256_maddubs_epi16(low, x), second = _mm256_maddubs_epi16(high, x);
      products[t][0] = c == 0 ? first : _mm256_add_epi16(products[t][0], first);
      products[t][1] = c == 0 ? second : _mm256_add_epi16(products[t][1], second);
    }
  }
}

template <int kTokens>
void multiply_tokens(const uint8_t* tile, int num_inputs, const TileInputs* inputs, bool accumulate, float* out,
                     int64_t out_stride) {
  for (int half = 0; half < 2; ++half) {
    __m256i sums[kTokens][2];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = _mm256_set1_epi32(inputs[t].offset);
    for (int k = 0; k < num_inputs; k += kGroup) {
      __m256i products[kTokens][2];
      const auto cell = [&](int t, int c) { return inputs[t].cells + k + place(c) * kCellBytes; };
      multiply_columns<kTokens>(tile + k * 16 + half * 32, cell, products);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        sums[t][0] = add_pairs(sums[t][0], products[t][0]);
        sums[t][1] = add_pairs(sums[t][1], products[t][1]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256 step = _mm256_set1_ps(inputs[t].step);
      for (int i = 0; i < 2; ++i) {
        float* target = out + t * out_stride + half * 8 + i * 16;
        __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[t][i]), step);
        if (accumulate) value = _mm256_add_ps(_mm256_loadu_ps(target), value);
        _mm256_storeu_ps(target, value);
      }
    }
  }
}

void multiply_tile(const uint8_t* tile, int num_inputs, const TileInputs* inputs, int num_tokens, bool accumulate,
                   float* out, int64_t out_stride) {
  constexpr decltype(&multiply_tokens<1>) kTiles[kTokensAtOnce] = {multiply_tokens<1>, multiply_tokens<2>,
                                                                   multiply_tokens<3>, multiply_tokens<4>};
  kTiles[num_tokens - 1](tile, num_inputs, inputs, accumulate, out, out_stride);
}

// 16 outputs at a time, front to back. The sums of more than one token live in memory.
template <int kTokens>
void multiply_row_tile(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, float* out) {
  for (int half = 0; half < 2; ++half) {
    __m256 sums[kSums][kTokens][2];
    for (auto& sum : sums) {
      for (auto& of_token : sum) of_token[0] = of_token[1] = _mm256_setzero_ps();
    }
    for (int begin = 0; begin < num_groups; begin += kSums) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const int g = begin + i;
        if (g >= num_groups) break;
        const uint8_t* tile = tiles + g * kGroup * kInputBytes;
        __m256i products[kTokens][2];
        const auto cell = [&](int t, int c) { return inputs[t].integers + g * kGroup + c * kCellBytes; };
        multiply_columns<kTokens>(tile + half * 32, cell, products);
        const uint8_t* halves = tile + 16 * kGroup + half * 16;
        const __m256 scales[2] = {load_halves(halves), load_halves(halves + 32)};
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const __m256i offset = _mm256_set1_epi32(inputs[t].offset[g]);
          const __m256 step = _mm256_set1_ps(inputs[t].step[g]);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            const __m256 product = _mm256_cvtepi32_ps(add_pairs(offset, products[t][j]));
            sums[i][t][j] = _mm256_add_ps(sums[i][t][j], _mm256_mul_ps(product, _mm256_mul_ps(scales[j], step)));
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int j = 0; j < 2; ++j) {
        const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0][t][j], sums[1][t][j]), sums[2][t][j]);
        _mm256_storeu_ps(out + t * kGroup + half * 8 + j * 16, _mm256_add_ps(sum, sums[3][t][j]));
      }
    }
  }
}

void multiply_rows(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, int num_tokens, float* out) {
  constexpr decltype(&multiply_row_tile<1>) kTiles[kTokensAtOnce] = {multiply_row_tile<1>, multiply_row_tile<2>,
                                                                     multiply_row_tile<3>, multiply_row_tile<4>};
  kTiles[num_tokens - 1](tiles, num_groups, inputs, out);
}

// Half of a block's keys at a time. Signs move from keys to queries: products of unsigned and signed bytes.
template <int kRows>
void multiply_keys_tile(const int8_t* cells, const AttentionRow* rows, int64_t head_dim, int32_t* dots) {
  for (int j = 0; j < kKeys; j += 32) {
    __m256i sums[kRows][4];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_setzero_si256();
    }
    for (int64_t d = 0; d < head_dim; d += kCellBytes) {
      const auto* keys = reinterpret_cast<const __m256i*>(cells + (d / kCellBytes * kKeys + j) * kCellBytes);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        int32_t cell;
        std::memcpy(&cell, rows[r].integers + d, sizeof(cell));
        const __m256i x = _mm256_set1_epi32(cell);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i key = _mm256_loadu_si256(keys + i);
          sums[r][i] = add_pairs(sums[r][i], _mm256_maddubs_epi16(_mm256_abs_epi8(key), _mm256_sign_epi8(x, key)));
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + r * kKeys + j + 8 * i), sums[r][i]);
      }
    }
  }
}

void multiply_keys(const int8_t* cells, const AttentionRow* rows, int num_rows, int64_t head_dim, int32_t* dots) {
  (num_rows == 2 ? multiply_keys_tile<2> : multiply_keys_tile<1>)(cells, rows, head_dim, dots);
}

// 16 channels at a time. Two products of at most 127 * 127 fit 16 bits.
template <int kRows>
void multiply_values_tile(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_keys, int64_t head_dim,
                          int count, int32_t (*products)[kChannels]) {
  for (int d = 0; d < count; d += 16) {
    __m256i sums[kRows][2];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int j = 0; j < num_keys; j += kCellBytes) {
      const auto* values = reinterpret_cast<const __m256i*>(cells + j * head_dim + d * kCellBytes);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = repeat_cell(probabilities[r] + j);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          sums[r][i] = add_pairs(sums[r][i], _mm256_maddubs_epi16(x, _mm256_loadu_si256(values + i)));
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(products[r] + d + 8 * i), sums[r][i]);
      }
    }
  }
}

void multiply_values(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_rows, int num_keys,
                     int64_t head_dim, int64_t first, int count, int32_t (*products)[kChannels]) {
  const auto multiply = num_rows == 2 ? multiply_values_tile<2> : multiply_values_tile<1>;
  multiply(cells + first * kCellBytes, probabilities, num_keys, head_dim, count, products);
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

}  // namespace

const Isa kAvx2 = {
    "avx2",        supported,     quantize_cells, kTokensAtOnce, multiply_tile, quantize_inputs, kTokensAtOnce,
    multiply_rows, router_logits, sigmoid,        add,           silu_multiply, rms_norm,        rotate_and_normalize,
    attend,        merge_row,     quantize_head,  expand_row,    from_bf16,     to_bf16};

}  // namespace mobilemoe
