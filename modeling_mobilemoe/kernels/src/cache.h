// The key-value cache of a layer: [KV heads, blocks], and a block 64 keys and their values, in the order in which
// attention reads them.
#pragma once

#include <cstdint>

#include "isa.h"
#include "mobilemoe.h"

namespace mobilemoe {

// Keys lie [head_dim, 64], in INT8 [head_dim / 4, 64, 4], so that they need no transposing; then, in INT8, 64 steps;
// values [64, head_dim], in INT8 [64 / 4, head_dim, 4]; in INT8, 64 steps.
struct Cache {
  const mobilemoe_cache& args;

  int64_t size() const { return args.type == MOBILEMOE_FP32 ? 4 : args.type == MOBILEMOE_BF16 ? 2 : 1; }
  int64_t matrix_bytes() const { return kKeys * args.head_dim * size(); }
  int64_t step_bytes() const { return args.type == MOBILEMOE_INT8 ? kKeys * static_cast<int64_t>(sizeof(float)) : 0; }
  int64_t block_bytes() const { return 2 * (matrix_bytes() + step_bytes()); }

  char* block(int64_t kv_head, int64_t index) const {
    return static_cast<char*>(args.blocks) + (kv_head * args.num_blocks + index) * block_bytes();
  }
  char* keys(char* block) const { return block; }
  float* key_steps(char* block) const { return reinterpret_cast<float*>(block + matrix_bytes()); }
  char* values(char* block) const { return block + matrix_bytes() + step_bytes(); }
  float* value_steps(char* block) const { return reinterpret_cast<float*>(values(block) + matrix_bytes()); }

  // Writes one token's key and value of one head. `scratch` has 2 bytes per channel.
  void write(int64_t kv_head, int64_t position, const float* key, const float* value, void* scratch) const;

  // BF16 is converted to `unpacked_keys` and `unpacked_values` [64 * head_dim].
  CachedBlock read(int64_t kv_head, int64_t index, float* unpacked_keys, float* unpacked_values) const;
};

int check_cache(const mobilemoe_cache& cache, int64_t start, int64_t num_tokens);

}  // namespace mobilemoe
