#include "cache.h"

#include <cstring>
#include <initializer_list>

#include "errors.h"
#include "threads.h"

namespace mobilemoe {
namespace {

constexpr int64_t kMaxHeadDim = 4096, kMaxHeads = 1 << 16, kMaxBlocks = int64_t{1} << 30;

}  // namespace

void Cache::write(int64_t kv_head, int64_t position, const float* key, const float* value, void* scratch) const {
  char* at = block(kv_head, position / kKeys);
  const int64_t place = position % kKeys, dim = args.head_dim;
  if (args.type == MOBILEMOE_FP32) {
    auto* keys_at = reinterpret_cast<float*>(keys(at)) + place;
    for (int64_t d = 0; d < dim; ++d) keys_at[d * kKeys] = key[d];
    std::memcpy(values(at) + place * dim * sizeof(float), value, dim * sizeof(float));
  } else if (args.type == MOBILEMOE_BF16) {
    auto* keys_at = reinterpret_cast<uint16_t*>(keys(at)) + place;
    auto* rounded = static_cast<uint16_t*>(scratch);
    isa().to_bf16(key, dim, rounded);
    for (int64_t d = 0; d < dim; ++d) keys_at[d * kKeys] = rounded[d];
    isa().to_bf16(value, dim, reinterpret_cast<uint16_t*>(values(at)) + place * dim);
  } else {
    auto* integers = static_cast<int8_t*>(scratch);
    key_steps(at)[place] = isa().quantize_head(key, dim, integers);
    for (int64_t d = 0; d < dim; d += kCellBytes) {
      std::memcpy(keys(at) + (d / kCellBytes * kKeys + place) * kCellBytes, integers + d, kCellBytes);
    }
    value_steps(at)[place] = isa().quantize_head(value, dim, integers);
    char* values_at = values(at) + place / kCellBytes * dim * kCellBytes + place % kCellBytes;
    for (int64_t d = 0; d < dim; ++d) values_at[d * kCellBytes] = static_cast<char>(integers[d]);
  }
}

CachedBlock Cache::read(int64_t kv_head, int64_t index, float* unpacked_keys, float* unpacked_values) const {
  char* at = block(kv_head, index);
  const int64_t count = kKeys * args.head_dim;
  if (args.type == MOBILEMOE_FP32) {
    auto *keys_at = reinterpret_cast<float*>(keys(at)), *values_at = reinterpret_cast<float*>(values(at));
    return {keys_at, values_at, nullptr, nullptr, nullptr, nullptr};
  }
  if (args.type == MOBILEMOE_BF16) {
    isa().from_bf16(reinterpret_cast<uint16_t*>(keys(at)), count, unpacked_keys);
    isa().from_bf16(reinterpret_cast<uint16_t*>(values(at)), count, unpacked_values);
    return {unpacked_keys, unpacked_values, nullptr, nullptr, nullptr, nullptr};
  }
  return {nullptr,       nullptr,        reinterpret_cast<int8_t*>(keys(at)), reinterpret_cast<int8_t*>(values(at)),
          key_steps(at), value_steps(at)};
}

int check_cache(const mobilemoe_cache& cache, int64_t start, int64_t num_tokens) {
  if (cache.type != MOBILEMOE_FP32 && cache.type != MOBILEMOE_BF16 && cache.type != MOBILEMOE_INT8) {
    return fail("the cache's type %d is neither FP32, BF16 nor INT8", cache.type);
  }
  if (cache.head_dim < 16 || cache.head_dim > kMaxHeadDim || cache.head_dim % 16 != 0) {
    return fail("head_dim=%lld is not a multiple of 16 up to %lld", (long long)cache.head_dim, (long long)kMaxHeadDim);
  }
  if (cache.num_kv_heads < 1 || cache.num_kv_heads > kMaxHeads || cache.num_blocks < 0 ||
      cache.num_blocks > kMaxBlocks) {
    return fail("a cache of %lld heads and %lld blocks", (long long)cache.num_kv_heads, (long long)cache.num_blocks);
  }
  const int64_t length = cache.num_blocks * kKeys;
  if (num_tokens < 0 || start < 0 || num_tokens > length || start > length - num_tokens) {
    return fail("positions %lld to %lld are not in a cache of %lld", (long long)start,
                (long long)(start + num_tokens - 1), (long long)length);
  }
  if (num_tokens > 0 && cache.blocks == nullptr) return fail("the cache is null");
  return MOBILEMOE_OK;
}

}  // namespace mobilemoe

int mobilemoe_cache_type(int64_t head_dim, int64_t block_bytes) {
  using namespace mobilemoe;
  for (const int32_t type : {MOBILEMOE_FP32, MOBILEMOE_BF16, MOBILEMOE_INT8}) {
    const mobilemoe_cache cache = {type, 0, head_dim, 0, nullptr};
    if (head_dim > 0 && Cache{cache}.block_bytes() == block_bytes) return type;
  }
  return -1;
}

int mobilemoe_update_cache(const mobilemoe_cache* cache, int64_t start, int64_t num_tokens, const float* key,
                           const float* value, int64_t num_threads) {
  using namespace mobilemoe;
  if (cache == nullptr) return fail("the cache is null");
  if (const int status = check_cache(*cache, start, num_tokens)) return status;
  if (const int status = check_threads(num_threads)) return status;
  if (num_tokens > 0 && (key == nullptr || value == nullptr)) return fail("key or value is null");
  const Cache to{*cache};
  const int64_t num_heads = cache->num_kv_heads, dim = cache->head_dim;
  constexpr int64_t kTokens = 64;
  const Phase written([&] { return ceil_div(num_tokens, kTokens); },
                      [&](int64_t unit, int64_t) {
                        alignas(64) char scratch[2 * kMaxHeadDim];
                        for (int64_t t = unit * kTokens; t < smaller((unit + 1) * kTokens, num_tokens); ++t) {
                          for (int64_t head = 0; head < num_heads; ++head) {
                            const int64_t at = (t * num_heads + head) * dim;
                            to.write(head, start + t, key + at, value + at, scratch);
                          }
                        }
                      });
  run_phases(num_tokens > kTokens ? num_threads : 1, written);
  return MOBILEMOE_OK;
}
