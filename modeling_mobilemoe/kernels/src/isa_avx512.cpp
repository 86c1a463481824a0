// AVX-512 with VNNI: 64 products of unsigned and signed bytes per instruction.
#include <immintrin.h>

#include "vectors.h"

namespace mobilemoe {
namespace {

// sums += cells * x. As assembler, because GCC 12 copies the sums of the intrinsic from register to register, and
// spills.
inline void add_products(__m512i& sums, __m512i cells, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(cells), "v"(x));
}

inline __m512i low_nibbles(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }

inline __m512i high_nibbles(__m512i packed) { return low_nibbles(_mm512_srli_epi16(packed, 4)); }

inline __m512i repeat_cell(const int8_t* cell) {
  int32_t value;
  std::memcpy(&value, cell, sizeof(value));
  return _mm512_set1_epi32(value);
}

inline __m512 load_halves(const void* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
}

// Packing 64 numbers to bytes leaves cell 4i + j of them at place 4j + i.
inline int place(int cell) { return cell / 16 * 16 + cell % 4 * 4 + cell / 4 % 4; }

// As in vectors.h, of tiles with kVectors * 16 inputs. What is scaled stays in registers.
template <int kVectors>
void quantize_tile(const float* const* x, int num_tokens, const uint16_t* scales, TileInputs* inputs) {
  __m512 factors[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) factors[i] = load_halves(scales + 16 * i);
  for (int t = 0; t < num_tokens; ++t) {
    __m512 scaled[8];
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      scaled[i] = _mm512_setzero_ps();
      if (i < kVectors) scaled[i] = _mm512_mul_ps(_mm512_loadu_ps(x[t] + 16 * i), factors[i % kVectors]);
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(scaled[i]), _mm512_set1_epi32(0x7FFFFFFF));
      largest = _mm512_max_epu32(largest, bits);
    }
    const Rounding rounding(_mm512_reduce_max_epu32(largest));
    const __m512 inverse = _mm512_set1_ps(rounding.inverse);
    __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int half = 0; half < (kVectors + 3) / 4; ++half) {
      __m512i rounded[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rounded[i] = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[4 * half + i], inverse));
      const __m512i cells =
          _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), _mm512_packs_epi32(rounded[2], rounded[3]));
      add_products(sums, _mm512_set1_epi8(1), cells);
      _mm512_store_si512(inputs[t].cells + 64 * half, cells);
    }
    inputs[t].step = rounding.step;
    inputs[t].offset = -kBias * _mm512_reduce_add_epi32(sums);
  }
}

void quantize_cells(const float* const* x, int num_tokens, const uint16_t* scales, int num_inputs,
                    TileInputs* inputs) {
  constexpr decltype(&quantize_tile<2>) kTiles[] = {quantize_tile<2>, quantize_tile<4>, quantize_tile<6>,
                                                    quantize_tile<8>};
  kTiles[num_inputs / 32 - 1](x, num_tokens, scales, inputs);
}

inline void finish(__m512i sums, float step, bool accumulate, float* out) {
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(step));
  if (accumulate) value = _mm512_add_ps(_mm512_loadu_ps(out), value);
  _mm512_storeu_ps(out, value);
}

// Every loop over tokens is unrolled, or the sums would live in memory instead of registers. Few tokens have more sums
// than outputs, or one product would wait for the one before.
template <int kTokens>
void multiply_tokens(const uint8_t* tile, int num_inputs, const TileInputs* inputs, bool accumulate, float* out,
                     int64_t out_stride) {
  constexpr int kChains = kTokens <= 2 ? 2 : 1;
  __m512i low[kTokens][kChains], high[kTokens][kChains];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    low[t][0] = high[t][0] = _mm512_set1_epi32(inputs[t].offset);
    if (kChains == 2) low[t][kChains - 1] = high[t][kChains - 1] = _mm512_setzero_si512();
  }
  for (int column = 0; column < num_inputs / kCellBytes; column += 8) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const __m512i packed = _mm512_loadu_si512(tile + (column + c) * kColumnBytes);
      const __m512i first = low_nibbles(packed), second = high_nibbles(packed);
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        const __m512i x = repeat_cell(inputs[t].cells + place(column + c) * kCellBytes);
        add_products(low[t][c % kChains], first, x);
        add_products(high[t][c % kChains], second, x);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    if (kChains == 2) {
      low[t][0] = _mm512_add_epi32(low[t][0], low[t][kChains - 1]);
      high[t][0] = _mm512_add_epi32(high[t][0], high[t][kChains - 1]);
    }
    finish(low[t][0], inputs[t].step, accumulate, out + t * out_stride);
    finish(high[t][0], inputs[t].step, accumulate, out + t * out_stride + 16);
  }
}

void multiply_tile(const uint8_t* tile, int num_inputs, const TileInputs* inputs, int num_tokens, bool accumulate,
                   float* out, int64_t out_stride) {
  constexpr decltype(&multiply_tokens<1>) kTiles[kTileTokens] = {
      multiply_tokens<1>, multiply_tokens<2>,  multiply_tokens<3>,  multiply_tokens<4>,
      multiply_tokens<5>, multiply_tokens<6>,  multiply_tokens<7>,  multiply_tokens<8>,
      multiply_tokens<9>, multiply_tokens<10>, multiply_tokens<11>, multiply_tokens<12>};
  kTiles[num_tokens - 1](tile, num_inputs, inputs, accumulate, out, out_stride);
}

// Groups first, first + kStep, ... of kTokens tokens; the sums of group g go to sums[g % kCount].
template <int kTokens, int kCount>
void add_groups(const uint8_t* tiles, int first, int num_groups, const LinearInputs* inputs,
                __m512 (*sums)[kTokens][2]) {
  constexpr int kStep = kCount == kSums ? 1 : kSums;
  for (int begin = first; begin < num_groups; begin += kCount * kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const int g = begin + i;
      if (g >= num_groups) break;
      const uint8_t* tile = tiles + g * kGroup * kInputBytes;
      __m512i products[kTokens][2];
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm512_set1_epi32(inputs[t].offset[g]);
#pragma GCC unroll 8
      for (int c = 0; c < kGroup / kCellBytes; ++c) {
        const __m512i packed = _mm512_loadu_si512(tile + c * kColumnBytes);
        const __m512i low = low_nibbles(packed), high = high_nibbles(packed);
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
          const __m512i x = repeat_cell(inputs[t].integers + g * kGroup + c * kCellBytes);
          add_products(products[t][0], low, x);
          add_products(products[t][1], high, x);
        }
      }
      const __m512 scales[2] = {load_halves(tile + 16 * kGroup), load_halves(tile + 17 * kGroup)};
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m512 step = _mm512_set1_ps(inputs[t].step[g]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512 product = _mm512_cvtepi32_ps(products[t][half]);
          sums[i][t][half] =
              _mm512_add_ps(sums[i][t][half], _mm512_mul_ps(product, _mm512_mul_ps(scales[half], step)));
        }
      }
    }
  }
}

// Few tokens read the tiles front to back, all four sums at once.
template <int kTokens>
void multiply_row_stream(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, float* out) {
  __m512 sums[kSums][kTokens][2];
  for (auto& sum : sums) {
    for (auto& of_token : sum) of_token[0] = of_token[1] = _mm512_setzero_ps();
  }
  add_groups<kTokens, kSums>(tiles, 0, num_groups, inputs, sums);
  for (int t = 0; t < kTokens; ++t) {
    for (int half = 0; half < 2; ++half) {
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0][t][half], sums[1][t][half]), sums[2][t][half]);
      _mm512_storeu_ps(out + t * kGroup + half * 16, _mm512_add_ps(sum, sums[3][t][half]));
    }
  }
}

// More tokens take one sum after the other, in registers; the tiles come from cache.
template <int kTokens>
void multiply_row_tile(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, float* out) {
  for (int first = 0; first < kSums; ++first) {
    __m512 sums[1][kTokens][2];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) sums[0][t][0] = sums[0][t][1] = _mm512_setzero_ps();
    add_groups<kTokens, 1>(tiles, first, num_groups, inputs, sums);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      for (int half = 0; half < 2; ++half) {
        float* target = out + t * kGroup + half * 16;
        const __m512 sum = sums[0][t][half];
        _mm512_storeu_ps(target, first > 0 ? _mm512_add_ps(_mm512_loadu_ps(target), sum) : sum);
      }
    }
  }
}

constexpr int kLinearTokens = 6;

void multiply_rows(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, int num_tokens, float* out) {
  constexpr decltype(&multiply_row_tile<1>) kTiles[kLinearTokens] = {multiply_row_stream<1>, multiply_row_stream<2>,
                                                                     multiply_row_stream<3>, multiply_row_stream<4>,
                                                                     multiply_row_tile<5>,   multiply_row_tile<6>};
  kTiles[num_tokens - 1](tiles, num_groups, inputs, out);
}

template <int kRows>
void multiply_keys_tile(const int8_t* cells, const AttentionRow* rows, int64_t head_dim, int32_t* dots) {
  __m512i sums[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // Keys are multiplied plus 128, without their sign.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_set1_epi32(-128 * rows[r].sum);
  }
  for (int64_t d = 0; d < head_dim; d += kCellBytes) {
    __m512i keys[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      keys[i] = _mm512_xor_si512(_mm512_loadu_si512(cells + d * kKeys + i * 64), _mm512_set1_epi8(-128));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t cell;
      std::memcpy(&cell, rows[r].integers + d, sizeof(cell));
      const __m512i x = _mm512_set1_epi32(cell);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_products(sums[r][i], keys[i], x);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(dots + r * kKeys + i * 16, sums[r][i]);
  }
}

void multiply_keys(const int8_t* cells, const AttentionRow* rows, int num_rows, int64_t head_dim, int32_t* dots) {
  constexpr decltype(&multiply_keys_tile<1>) kTiles[kAttendRows] = {multiply_keys_tile<1>, multiply_keys_tile<2>,
                                                                    multiply_keys_tile<3>, multiply_keys_tile<4>};
  kTiles[num_rows - 1](cells, rows, head_dim, dots);
}

// kVectors * 16 channels.
template <int kRows, int kVectors>
void multiply_channels(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_keys, int64_t head_dim,
                       int32_t (*products)[kChannels]) {
  __m512i sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_si512();
  }
  for (int j = 0; j < num_keys; j += kCellBytes) {
    __m512i values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) values[v] = _mm512_loadu_si512(cells + j * head_dim + v * 64);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = repeat_cell(probabilities[r] + j);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_products(sums[r][v], x, values[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(products[r] + v * 16, sums[r][v]);
  }
}

template <int kRows>
void multiply_values_tile(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_keys, int64_t head_dim,
                          int count, int32_t (*products)[kChannels]) {
  if (count == kChannels) return multiply_channels<kRows, 4>(cells, probabilities, num_keys, head_dim, products);
  for (int d = 0; d < count; d += 16) {
    int32_t part[kRows][kChannels];
    multiply_channels<kRows, 1>(cells + d * kCellBytes, probabilities, num_keys, head_dim, part);
    for (int r = 0; r < kRows; ++r) std::memcpy(products[r] + d, part[r], 16 * sizeof(int32_t));
  }
}

void multiply_values(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_rows, int num_keys,
                     int64_t head_dim, int64_t first, int count, int32_t (*products)[kChannels]) {
  constexpr decltype(&multiply_values_tile<1>) kTiles[kAttendRows] = {
      multiply_values_tile<1>, multiply_values_tile<2>, multiply_values_tile<3>, multiply_values_tile<4>};
  kTiles[num_rows - 1](cells + first * kCellBytes, probabilities, num_keys, head_dim, count, products);
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Isa kAvx512 = {
    "avx512",      supported,     quantize_cells, kTileTokens, multiply_tile, quantize_inputs, kLinearTokens,
    multiply_rows, router_logits, sigmoid,        add,         silu_multiply, rms_norm,        rotate_and_normalize,
    attend,        merge_row,     quantize_head,  expand_row,  from_bf16,     to_bf16};

}  // namespace mobilemoe
