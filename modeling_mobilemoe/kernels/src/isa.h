// What an instruction set provides, and the arithmetic that all of them share bit for bit.
//
// Weights come in tiles of 32 outputs by some inputs. For every 4 inputs a tile has 64 bytes, 16 cells: the low
// nibbles of cell n are 4 integers of output n, its high nibbles those of output n + 16, all plus 8. FP16 scales lie
// before them in an expert, after them in a linear. Tiles of the same outputs lie side by side, so that reading them is
// one stream forward.
//
// Experts: y[n] = sum_k x[k] * s[k, n / 32] * q[k, n] has its scale inside the reduction. So for every tile of 32
// outputs and up to 128 inputs, which has a scale for each input, the activations are multiplied by its scales and
// rounded to INT8 with one step; all products are then integers, and the tiles' sums are added in FP32, in order.
// Every path rounds in the same places, so results do not depend on the machine, the number of threads, or how tokens
// are batched.
//
// Linears: a tile has 32 inputs, which are a group, and a scale for each output. A group's products add up to an
// integer. Times the group's scale and step, it is added in FP32 to one of four sums: group g to sum g % 4, in order.
// The result is ((s0 + s1) + s2) + s3.
//
// These orders are part of the operators' definition. FP32 sums in another order differ in their last bits, which can
// move an input of the next operator by a whole INT8 step, and some layers later select another expert.
#pragma once

#include <cstdint>

namespace mobilemoe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kGroup = 32;        // weights that share a scale, and outputs of a tile
constexpr int kBlock = 128;       // inputs of an expert's tile, which share an INT8 step; the last tile may have fewer
constexpr int kCellBytes = 4;     // a cell: what one integer instruction adds up
constexpr int kColumnBytes = 64;  // 4 inputs of a tile
constexpr int kInputBytes = 18;   // of a tile for each input, with its share of the scales
// Integers are stored plus 8, because x86 multiplies unsigned by signed bytes; `offset` takes it back.
constexpr int kBias = 8;
constexpr int kDraftTokens = 8;  // up to so many tokens, a draft to verify, a layer is one region
constexpr int kTileTokens = 12;  // that a tile is multiplied with at a time
constexpr int kSums = 4;         // FP32 sums of a linear's output

// One token's inputs of an expert's tile: times the scales, in INT8.
struct alignas(64) TileInputs {
  int8_t cells[kBlock];  // in the order in which the instruction set takes them
  float step;
  int32_t offset;  // -8 times the sum of the integers
};

// One token's inputs of a linear: INT8 with a step for each group of 32.
struct LinearInputs {
  int8_t* integers;  // [K]
  float* step;       // [K / 32]
  int32_t* offset;   // [K / 32]: -8 times the sum of the group's integers
};

constexpr int kKeys = 64;  // keys of a block of the cache, which attention takes at a time

// One query of one head, and its softmax so far.
struct AttentionRow {
  const float* query;      // [head_dim]
  const int8_t* integers;  // [head_dim]: the query divided by `step`, for keys in INT8
  float step;
  int32_t sum;  // of the integers
  float* sums;  // [head_dim]: values times probabilities, not yet divided by `total`
  float largest, total;
  int num_keys;  // that it sees of a block: the first ones
};

// One block of a head's keys and values: in FP32, or in INT8 with the steps of both.
struct CachedBlock {
  const float* keys;          // [head_dim, kKeys], or null
  const float* values;        // [kKeys, head_dim]
  const int8_t* key_cells;    // [head_dim / 4, kKeys, 4], or null
  const int8_t* value_cells;  // [kKeys / 4, head_dim, 4]
  const float* key_steps;     // [kKeys]
  const float* value_steps;   // [kKeys]
};

struct Isa {
  const char* name;
  bool (*supported)();

  // Each token's x[t] [num_inputs] times FP16 scales -> INT8. num_inputs is a multiple of 32, at most kBlock.
  void (*quantize)(const float* const* x, int num_tokens, const uint16_t* scales, int num_inputs, TileInputs* inputs);
  // out[token, 32] (+)= a tile of an expert times up to `expert_tokens` tokens.
  int expert_tokens;
  void (*multiply_tile)(const uint8_t* tile, int num_inputs, const TileInputs* inputs, int num_tokens, bool accumulate,
                        float* out, int64_t out_stride);

  // x [num_groups * 32] -> inputs.
  void (*quantize_inputs)(const float* x, int num_groups, const LinearInputs& inputs);
  // out[token, 32] = the tiles of 32 outputs of a linear times up to `linear_tokens` tokens.
  int linear_tokens;
  void (*multiply_rows)(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, int num_tokens, float* out);

  // logits[t, e] = x[t] . router[e], t in [0, num_tokens), e in [first, last). D is a multiple of 16.
  void (*router_logits)(const float* x, int64_t num_tokens, int64_t dim, const float* router, int64_t first,
                        int64_t last, int64_t num_experts, float* logits);
  void (*sigmoid)(float* values, int64_t count);
  // sum += weight * addend; count is a multiple of 16.
  void (*add)(float* sum, const float* addend, float weight, int64_t count);
  // gate = silu(gate) * up; count is a multiple of 16.
  void (*silu_multiply)(float* gate, const float* up, int64_t count);
  // out = x / sqrt(mean(x^2) + eps) * weight; dim is a multiple of 16.
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float* out);
  // Heads of one token in place: adjacent channels rotated by cos and sin [head_dim / 2], then the norm above without
  // a weight. With `round`, what the rotation gives is rounded to BF16.
  void (*rotate_and_normalize)(float* states, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                               float eps, bool round);
  // Takes rows over one block. head_dim is a multiple of 16.
  void (*attend)(AttentionRow* rows, int num_rows, const CachedBlock& block, int64_t head_dim, float scale);
  // Adds the softmax of later keys to that of all before.
  void (*merge_row)(const AttentionRow& part, AttentionRow* whole, int64_t head_dim);
  // x [dim] -> INT8 and their step. dim is a multiple of 16.
  float (*quantize_head)(const float* x, int64_t dim, int8_t* out);
  // One output's weights, of 32 in these tiles -> FP32.
  void (*expand_row)(const uint8_t* tiles, int row, int64_t num_groups, float* out);
  void (*from_bf16)(const uint16_t* x, int64_t count, float* out);
  void (*to_bf16)(const float* x, int64_t count, uint16_t* out);
};

extern const Isa kPortable, kAvx2, kAvx512, kNeon, kI8mm;

// The instruction set in use.
const Isa& isa();

}  // namespace mobilemoe
