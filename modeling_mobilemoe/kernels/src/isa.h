// What an instruction set provides, and the arithmetic that all of them share bit for bit.
//
// y[n] = sum_k x[k] * s[k, n / 32] * q[k, n] has its scale inside the reduction. So for every group of 32 outputs and
// every block of 128 inputs, the activations are multiplied by that group's scales and rounded to INT8 with one step;
// all products are then integers, and the blocks' sums are added in FP32, in order. Every path rounds in the same
// places, so results do not depend on the machine, the number of threads, or how tokens are batched.
//
// Linears have their groups along the input. A group's products add up to an integer. Times the group's scale and step,
// it is added in FP32 to one of four sums: group g to sum g % 4, in order. The result is ((s0 + s1) + s2) + s3. With
// few tokens the four are lanes of a register; with many tokens they are computed one after the other.
//
// These orders are part of the operators' definition. FP32 sums in another order differ in their last bits, which can
// move an input of the next operator by a whole INT8 step, and some layers later select another expert.
#pragma once

#include <cstdint>

namespace mobilemoe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kGroup = 32;       // outputs that share a scale: 16 bytes of a row
constexpr int kStripGroups = 4;  // a strip: 4 groups, 128 outputs, 64 bytes of a row
constexpr int kStrip = kStripGroups * kGroup;
constexpr int kChunkGroups = 8;  // a chunk: two strips, quantised together
constexpr int kBlock = 128;      // inputs that share an INT8 step
constexpr int kCellBytes = 4;    // a cell: 4 consecutive inputs of one output, what one integer instruction adds up
constexpr int kMaxTile = 12;     // tokens that a panel is multiplied with at a time
// Integers are stored plus 8, because x86 multiplies unsigned by signed bytes; `Activations::offset` takes it back.
constexpr int kBias = 8;

// Within a group, accumulators hold the 16 even outputs and then the 16 odd ones, as the nibbles come out of a byte.

// One block of one token, scaled and rounded once for each of the 8 groups of a chunk.
struct alignas(64) Activations {
  int32_t cells[kBlock / 16][kChunkGroups][4];  // cells of 4 INT8; 16 inputs of each group side by side
  float step[kChunkGroups];
  int32_t offset[kChunkGroups];  // -8 times the sum of the integers
};

// FP16 scales of some rows of a chunk: `num_low` groups of one strip, `num_high` of another, `stride` apart by row.
struct ChunkScales {
  const uint16_t* low;
  const uint16_t* high;
  int num_low, num_high;
  int64_t stride;
};

// INT4 rows of a strip, `stride` bytes apart; the last strip of a matrix may have fewer than 4 groups.
struct Strip {
  const uint8_t* rows;
  int64_t stride;
  int num_groups;
};

// One token's inputs of a linear, whose groups run along the input: INT8 with a step for each 32 of them. Even and odd
// inputs lie apart, as their weights' nibbles do. All is padded with zeros to a multiple of 4 groups.
struct LinearInputs {
  int8_t* even;     // [K / 2]
  int8_t* odd;      // [K / 2]
  float* step;      // [K / 32]
  int32_t* offset;  // [K / 8]: -8 times the sum of the 4 even and 4 odd integers that meet in one cell
};

constexpr int kSums = 4;           // FP32 sums of a linear's output
constexpr int kAhead = 4096;       // bytes that reading a linear's weights front to back fetches in advance
constexpr int kPanelRows = 32;     // outputs of a linear that are unpacked together
constexpr int kMaxLinearTile = 6;  // tokens that they are multiplied with at a time

constexpr int kKeys = 64;  // keys that attention takes at a time

// One query of one head, and its softmax so far.
struct AttentionRow {
  const float* query;  // [head_dim]
  float* sums;         // [head_dim]: values times probabilities, not yet divided by `total`
  float largest, total;
  int num_keys;  // that it sees of a block: the first ones
};

struct Isa {
  const char* name;
  bool (*supported)();
  // Tokens per call of `multiply_panel`, at most kMaxTile.
  int tile;

  // -> scales [num_rows / 4, 8, 4]: 4 rows of each group side by side, zero where the chunk has no group.
  void (*load_scales)(const ChunkScales& chunk, int num_rows, float* scales);
  // Each token's x[t] [num_rows] times scales -> INT8. num_rows is a multiple of 32, as everywhere, and at most
  // kBlock.
  void (*quantize)(const float* const* x, int num_tokens, const float* scales, int num_rows, Activations* activations);
  // Unpacks each group of a strip to cells in accumulator order; num_rows * 32 bytes, `group_stride` apart by group.
  void (*pack_strip)(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride);
  // out[token, 32] (+)= panel of one group times that group's lane of the tokens' activations.
  void (*multiply_panel)(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                         bool accumulate, float* out, int64_t out_stride);
  // out[128] = strip times lanes first_lane.. of one token's activations, straight from the packed rows. Prefetches
  // three quarters as many bytes from `next` on as it reads.
  void (*multiply_strip)(const Strip& strip, int num_rows, const Activations& activations, int first_lane,
                         const uint8_t* next, float* out);

  // x [num_groups * 32] -> inputs.
  void (*quantize_inputs)(const float* x, int num_groups, const LinearInputs& inputs);
  // out[n] = rows of an INT4 matrix times inputs, for few tokens: reads the weights front to back.
  void (*multiply_rows)(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                        const LinearInputs& inputs, float* out);
  // 32 rows -> panel [groups, 4, even or odd, 32, 4 bytes] and scales [groups, 32]; missing rows are zero.
  void (*pack_rows)(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups, uint8_t* panel,
                    float* scales);
  // out[token, 32] = panel times inputs of up to `linear_tile` tokens.
  int linear_tile;
  void (*multiply_row_panel)(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                             int num_tokens, float* out);

  // logits[t, e] = x[t] . router[e], t in [0, num_tokens), e in [first, last). D is a multiple of 16.
  void (*router_logits)(const float* x, int64_t num_tokens, int64_t dim, const float* router, int64_t first,
                        int64_t last, int64_t num_experts, float* logits);
  void (*sigmoid)(float* values, int64_t count);
  // Gates and ups in accumulator order -> mid in order of the outputs; count is a multiple of 32.
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* mid);
  // sum += weight * addend, and accumulator order -> order of the outputs; count is a multiple of 32.
  void (*add)(float* sum, const float* addend, float weight, int64_t count);
  void (*in_order)(const float* accumulators, int64_t count, float* out);
  // gate = silu(gate) * up; count is a multiple of 16.
  void (*silu_multiply)(float* gate, const float* up, int64_t count);
  // out = x / sqrt(mean(x^2) + eps) * weight; dim is a multiple of 16.
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float* out);
  // Heads of one token in place: adjacent channels rotated by cos and sin [head_dim / 2], then the norm above without a
  // weight. With `round`, what the rotation gives is rounded to BF16.
  void (*rotate_and_normalize)(float* states, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                               float eps, bool round);
  // keys [num_keys, head_dim], `stride` apart -> out [head_dim, kKeys], zero where there is no key. head_dim is a
  // multiple of 16.
  void (*transpose_keys)(const float* keys, int64_t stride, int num_keys, int64_t head_dim, float* out);
  // Takes rows over one block of such keys and their values.
  void (*attend)(AttentionRow* rows, int num_rows, const float* keys, const float* values, int64_t value_stride,
                 int64_t head_dim, float scale);
  // One row of packed INT4 -> FP32.
  void (*expand_row)(const uint8_t* qweight, const uint16_t* scale, int64_t num_groups, float* out);
  void (*from_bf16)(const uint16_t* x, int64_t count, float* out);
  void (*to_bf16)(const float* x, int64_t count, uint16_t* out);
};

extern const Isa kPortable, kAvx2, kAvx512, kNeon, kI8mm;

// The instruction set in use.
const Isa& isa();

}  // namespace mobilemoe
