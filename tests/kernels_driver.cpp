// Runs the kernels over random shapes: every instruction set and number of threads must give the portable path's bits.
//
//     kernels_driver SHAPES SEED
//
// Buffers are allocated to the byte, so that a sanitizer sees a read past the end. The inputs come from integers
// alone: the checksum in the last line is the same on every machine.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "mobilemoe.h"

namespace {

constexpr const char* kIsas[] = {"portable", "avx2", "avx512", "neon", "i8mm"};

uint64_t state;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

int64_t between(int64_t low, int64_t high) { return low + random_bits() % (high - low + 1); }

template <typename T>
std::unique_ptr<T[]> buffer(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]());
}

std::unique_ptr<uint8_t[]> random_bytes(int64_t count) {
  auto bytes = buffer<uint8_t>(count);
  for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(random_bits());
  return bytes;
}

// Columns of tiles: random integers, and positive FP16 scales of one size, or anything from the smallest subnormal to the
// largest. A linear has 32 inputs in a tile and its scales last, an expert up to 128 and its scales first.
std::unique_ptr<uint8_t[]> random_tiles(int64_t num_columns, int64_t num_inputs, int64_t inputs_per_tile, bool is_wild) {
  auto tiles = random_bytes(num_columns * num_inputs * 18);
  uint8_t* tile = tiles.get();
  for (int64_t column = 0; column < num_columns; ++column) {
    for (int64_t first = 0; first < num_inputs; first += inputs_per_tile) {
      const int64_t count = std::min(inputs_per_tile, num_inputs - first);
      for (int64_t i = 0; i < count; ++i) {
        const auto scale = static_cast<uint16_t>(is_wild ? between(1, 0x7BFF) : between(0x1C00, 0x2000));
        std::memcpy(tile + (inputs_per_tile == 32 ? count * 16 : 0) + i * 2, &scale, sizeof(scale));
      }
      tile += count * 18;
    }
  }
  return tiles;
}

std::unique_ptr<float[]> random_floats(int64_t count, float size) {
  auto values = buffer<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = (static_cast<float>(between(0, 2000)) - 1000.0f) / 1000.0f * size;
  return values;
}

uint64_t checksum = 1469598103934665603u;

void add_to_checksum(const std::vector<uint8_t>& bytes) {
  for (const uint8_t byte : bytes) checksum = (checksum ^ byte) * 1099511628211u;
}

// Runs `call(out)` on every instruction set of this machine and compares.
template <typename Call>
bool agree(int64_t num_bytes, const Call& call) {
  std::vector<uint8_t> expected;
  for (const char* name : kIsas) {
    if (mobilemoe_set_isa(name) != MOBILEMOE_OK) continue;
    auto out = buffer<uint8_t>(num_bytes);
    if (call(out.get()) != MOBILEMOE_OK) {
      std::printf("%s refused: %s\n", name, mobilemoe_last_error());
      return false;
    }
    const std::vector<uint8_t> result(out.get(), out.get() + num_bytes);
    if (expected.empty()) expected = result;
    if (result != expected) {
      std::printf("%s differs from portable\n", name);
      return false;
    }
  }
  add_to_checksum(expected);
  return true;
}

// BF16 is the upper half of a float.
std::unique_ptr<uint16_t[]> to_bf16(const float* values, int64_t count) {
  auto halves = buffer<uint16_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  return halves;
}

bool fuzz_moe_ffn() {
  mobilemoe_moe_ffn_args args = {};
  const bool is_large = random_bits() % 200 == 0;
  args.dim = 32 * between(1, is_large ? 12 : 5);
  args.expert_dim = 32 * between(1, is_large ? 12 : 5);
  args.num_experts = between(1, 6);
  args.top_k = between(1, args.num_experts);
  args.num_tokens = between(0, is_large ? 150 : 9);
  args.route_scale = 2.5f;
  args.dtype = random_bits() % 4 == 0 ? MOBILEMOE_BF16 : MOBILEMOE_FP32;
  const int64_t t = args.num_tokens, d = args.dim, f = args.expert_dim, e = args.num_experts;
  const bool is_wild = random_bits() % 4 == 0;
  const auto x = random_floats(t * d, is_wild ? 1000.0f : 1.0f);
  const auto x_bf16 = to_bf16(x.get(), t * d);
  const auto router = random_floats(e * d, 0.1f), bias = random_floats(e, 0.3f);
  const auto gate_up = random_tiles(e * f / 16, d, 128, is_wild), down = random_tiles(e * d / 32, f, 128, is_wild);
  auto index = buffer<int64_t>(t * args.top_k);
  const auto weights = random_floats(t * args.top_k, 1.0f);
  args.x = args.dtype == MOBILEMOE_BF16 ? static_cast<const void*>(x_bf16.get()) : x.get();
  if (random_bits() % 2 == 0) {
    args.router = router.get();
    args.bias = random_bits() % 4 == 0 ? nullptr : bias.get();
  } else {
    for (int64_t i = 0; i < t * args.top_k; ++i) index[i] = between(0, e - 1);
    args.top_k_index = index.get();
    args.top_k_weights = weights.get();
  }
  args.gate_up = gate_up.get();
  args.down = down.get();
  const int64_t num_bytes = t * d * (args.dtype == MOBILEMOE_BF16 ? 2 : 4);
  const bool good = agree(num_bytes, [&](void* out) {
    args.out = out;
    return mobilemoe_moe_ffn(&args, between(1, 3));
  });
  if (!good) {
    std::printf("moe_ffn T=%lld D=%lld F=%lld E=%lld k=%lld\n", (long long)t, (long long)d, (long long)f, (long long)e,
                (long long)args.top_k);
  }
  // One bad argument: refused, whatever the others are.
  switch (random_bits() % 6) {
    case 0:
      args.dim += between(1, 31);
      break;
    case 1:
      args.expert_dim = -args.expert_dim;
      break;
    case 2:
      args.top_k = args.num_experts + 1;
      break;
    case 3:
      args.num_tokens = -1;
      break;
    case 4:
      args.dtype = 7;
      break;
    case 5:
      args.router = args.top_k_index != nullptr ? router.get() : nullptr;
      break;
  }
  return good && mobilemoe_moe_ffn(&args, 1) == MOBILEMOE_BAD_ARGUMENT;
}

bool fuzz_linear() {
  mobilemoe_linear_args args = {};
  args.in_features = 32 * between(1, 9);
  args.out_features = between(1, 70);
  args.num_tokens = between(0, 15);
  args.dtype = random_bits() % 4 == 0 ? MOBILEMOE_BF16 : MOBILEMOE_FP32;
  const int64_t t = args.num_tokens, k = args.in_features, n = args.out_features;
  const bool is_wild = random_bits() % 4 == 0;
  const auto x = random_floats(t * k, is_wild ? 1000.0f : 1.0f);
  const auto x_bf16 = to_bf16(x.get(), t * k);
  const auto tiles = random_tiles((n + 31) / 32, k, 32, is_wild);
  args.x = args.dtype == MOBILEMOE_BF16 ? static_cast<const void*>(x_bf16.get()) : x.get();
  args.tiles = tiles.get();
  const bool good = agree(t * n * (args.dtype == MOBILEMOE_BF16 ? 2 : 4), [&](void* out) {
    args.out = out;
    return mobilemoe_linear(&args, between(1, 3));
  });
  if (!good) std::printf("linear T=%lld K=%lld N=%lld\n", (long long)t, (long long)k, (long long)n);
  args.in_features += between(1, 31);
  return good && mobilemoe_linear(&args, 1) == MOBILEMOE_BAD_ARGUMENT;
}

// A random packed matrix, which keeps its memory.
struct Matrix {
  std::unique_ptr<uint8_t[]> tiles;
  int64_t rows;

  Matrix(int64_t n, int64_t k, bool is_wild) : tiles(random_tiles((n + 31) / 32, k, 32, is_wild)), rows(n) {}

  mobilemoe_matrix get() const { return {tiles.get(), rows}; }
};

bool fuzz_mlp() {
  mobilemoe_mlp_args args = {};
  args.dim = 32 * between(1, 5);
  args.num_tokens = between(0, 15);
  args.dtype = random_bits() % 4 == 0 ? MOBILEMOE_BF16 : MOBILEMOE_FP32;
  const int64_t t = args.num_tokens, d = args.dim, f = 32 * between(1, 7);
  const bool is_wild = random_bits() % 4 == 0;
  const auto x = random_floats(t * d, is_wild ? 1000.0f : 1.0f);
  const auto x_bf16 = to_bf16(x.get(), t * d);
  const Matrix gate(f, d, is_wild), up(f, d, is_wild), down(d, f, is_wild);
  args.x = args.dtype == MOBILEMOE_BF16 ? static_cast<const void*>(x_bf16.get()) : x.get();
  args.gate = gate.get();
  args.up = up.get();
  args.down = down.get();
  const bool good = agree(t * d * (args.dtype == MOBILEMOE_BF16 ? 2 : 4), [&](void* out) {
    args.out = out;
    return mobilemoe_mlp(&args, between(1, 3));
  });
  if (!good) std::printf("mlp T=%lld D=%lld F=%lld\n", (long long)t, (long long)d, (long long)f);
  --args.up.out_features;
  return good && mobilemoe_mlp(&args, 1) == MOBILEMOE_BAD_ARGUMENT;
}

bool fuzz_attention_inputs() {
  mobilemoe_attention_inputs_args args = {};
  args.dim = 32 * between(1, 5);
  args.head_dim = 2 * between(1, 40);
  args.num_tokens = between(0, 15);
  args.eps = 1e-5f;
  args.dtype = random_bits() % 4 == 0 ? MOBILEMOE_BF16 : MOBILEMOE_FP32;
  const int64_t t = args.num_tokens, d = args.dim, size = args.dtype == MOBILEMOE_BF16 ? 2 : 4;
  const int64_t keys = args.head_dim * between(1, 2), queries = keys * between(1, 3);
  const auto x = random_floats(t * d, 1.0f);
  const auto x_bf16 = to_bf16(x.get(), t * d);
  const Matrix query(queries, d, false), key(keys, d, false), value(keys, d, false);
  const auto cos = random_floats(t * args.head_dim / 2, 1.0f), sin = random_floats(t * args.head_dim / 2, 1.0f);
  args.x = args.dtype == MOBILEMOE_BF16 ? static_cast<const void*>(x_bf16.get()) : x.get();
  args.query = query.get();
  args.key = key.get();
  args.value = value.get();
  args.cos = cos.get();
  args.sin = sin.get();
  const bool good = agree(t * (queries + 2 * keys) * size, [&](void* out) {
    args.query_out = out;
    args.key_out = static_cast<char*>(out) + t * queries * size;
    args.value_out = static_cast<char*>(out) + t * (queries + keys) * size;
    return mobilemoe_attention_inputs(&args, between(1, 3));
  });
  if (!good) {
    std::printf("attention_inputs T=%lld D=%lld head=%lld\n", (long long)t, (long long)d, (long long)args.head_dim);
  }
  args.head_dim = 2 * args.query.out_features;
  return good && mobilemoe_attention_inputs(&args, 1) == MOBILEMOE_BAD_ARGUMENT;
}

bool fuzz_attention() {
  const bool is_large = random_bits() % 50 == 0;
  mobilemoe_attention_args args = {};
  args.num_tokens = between(0, is_large ? 90 : 12);
  args.start = between(0, is_large ? 700 : 90);
  const int32_t type = static_cast<int32_t>(between(0, 2));
  const int64_t kv_heads = between(1, 2), head_dim = 16 * between(1, 5);
  args.num_heads = kv_heads * between(1, 5);
  const int64_t length = args.start + args.num_tokens, num_blocks = (length + 63) / 64 + between(0, 1);
  const int64_t block_bytes = 128 * head_dim * (type == MOBILEMOE_FP32 ? 4 : type == MOBILEMOE_BF16 ? 2 : 1) +
                              (type == MOBILEMOE_INT8 ? 512 : 0);
  if (mobilemoe_cache_type(head_dim, block_bytes) != type) return false;
  const int64_t cached = length * kv_heads * head_dim, count = args.num_tokens * args.num_heads * head_dim;
  const float size = random_bits() % 4 == 0 ? 100.0f : 1.0f;
  const auto query = random_floats(count, size), keys = random_floats(cached, size);
  const auto values = random_floats(cached, size);
  args.query = query.get();
  const int64_t split = between(0, length), width = kv_heads * head_dim;
  const auto run = [&](void* out) {
    // What lies behind the last key is bytes of any kind.
    const int64_t num_bytes = kv_heads * num_blocks * block_bytes;
    auto blocks = buffer<uint8_t>(num_bytes);
    std::memset(blocks.get(), 0xFF, num_bytes);
    args.cache = {type, kv_heads, head_dim, num_blocks, blocks.get()};
    args.out = static_cast<float*>(out);
    for (const int64_t first : {int64_t{0}, split}) {
      const int status = mobilemoe_update_cache(&args.cache, first, length - first, keys.get() + first * width,
                                                values.get() + first * width, between(1, 3));
      if (status != MOBILEMOE_OK) return status;
    }
    return mobilemoe_attention(&args, between(1, 3));
  };
  bool good = agree(count * 4, run);
  if (good && args.num_tokens > 0) {
    // The last token alone gives its part of what all give together.
    auto whole = buffer<float>(count), alone = buffer<float>(count / args.num_tokens);
    good = run(whole.get()) == MOBILEMOE_OK;
    const int64_t before = args.num_tokens - 1;
    auto blocks = buffer<uint8_t>(kv_heads * num_blocks * block_bytes);
    args.cache.blocks = blocks.get();
    good = good && mobilemoe_update_cache(&args.cache, 0, length, keys.get(), values.get(), 1) == MOBILEMOE_OK;
    const mobilemoe_attention_args last = {1,
                                           args.start + before,
                                           args.num_heads,
                                           query.get() + before * args.num_heads * head_dim,
                                           args.cache,
                                           alone.get()};
    good = good && mobilemoe_attention(&last, 2) == MOBILEMOE_OK &&
           std::memcmp(alone.get(), whole.get() + before * args.num_heads * head_dim,
                       args.num_heads * head_dim * sizeof(float)) == 0;
  }
  if (!good) {
    std::printf("attention T=%lld at %lld, head=%lld, type %d\n", (long long)args.num_tokens, (long long)args.start,
                (long long)head_dim, type);
  }
  args.start = num_blocks * 64 + 1;
  return good && mobilemoe_attention(&args, 1) == MOBILEMOE_BAD_ARGUMENT &&
         mobilemoe_update_cache(&args.cache, -1, 1, keys.get(), values.get(), 1) == MOBILEMOE_BAD_ARGUMENT;
}

// The layer as its operators one by one.
int run_operators(const mobilemoe_layer_args& args) {
  const int64_t t = args.num_tokens, d = args.dim, q = args.query.out_features, k = args.key.out_features;
  auto normed = buffer<float>(t * d), hidden = buffer<float>(t * d), routed = buffer<float>(t * d);
  auto query = buffer<float>(t * q), key = buffer<float>(t * k), value = buffer<float>(t * k);
  auto attended = buffer<float>(t * q);
  int status = mobilemoe_rms_norm(args.x, args.attention_norm, t, d, args.eps, normed.get(), 1);
  const mobilemoe_attention_inputs_args inputs = {
      t,          d,        args.cache.head_dim, args.eps,    0,         normed.get(), args.query, args.key,
      args.value, args.cos, args.sin,            query.get(), key.get(), value.get()};
  status += mobilemoe_attention_inputs(&inputs, 2);
  status += mobilemoe_update_cache(&args.cache, args.start, t, key.get(), value.get(), 1);
  const mobilemoe_attention_args attention = {t,           args.start, q / args.cache.head_dim,
                                              query.get(), args.cache, attended.get()};
  status += mobilemoe_attention(&attention, 1);
  const mobilemoe_linear_args output = {t, q, d, 0, attended.get(), args.output.tiles, args.out};
  status += mobilemoe_linear(&output, 2);
  for (int64_t i = 0; i < t * d; ++i) hidden[i] = args.x[i] + args.out[i];
  status += mobilemoe_rms_norm(hidden.get(), args.feed_forward_norm, t, d, args.eps, normed.get(), 1);
  if (args.experts.num_experts > 0) {
    mobilemoe_moe_ffn_args experts = args.experts;
    experts.num_tokens = t;
    experts.dim = d;
    experts.x = normed.get();
    experts.out = routed.get();
    status += mobilemoe_moe_ffn(&experts, 2);
  }
  const mobilemoe_mlp_args shared = {t, d, 0, normed.get(), args.gate, args.up, args.down, args.out};
  status += mobilemoe_mlp(&shared, 2);
  for (int64_t i = 0; i < t * d; ++i) {
    args.out[i] = hidden[i] + (args.experts.num_experts > 0 ? routed[i] + args.out[i] : args.out[i]);
  }
  return status;
}

bool fuzz_layer() {
  mobilemoe_layer_args args = {};
  const int64_t head_dim = 32 * between(1, 2), kv_heads = between(1, 2), q = kv_heads * head_dim * between(1, 3);
  const int64_t d = 32 * between(1, 5), f = 32 * between(1, 6), ef = 32 * between(1, 5), e = between(0, 5);
  const int64_t t = random_bits() % 20 == 0 ? between(9, 40) : between(0, 8);
  args.num_tokens = t;
  args.start = random_bits() % 10 == 0 ? between(240, 530) : between(0, 70);
  args.dim = d;
  args.eps = 1e-5f;
  const auto x = random_floats(t * d, 1.0f), norm = random_floats(d, 2.0f), other_norm = random_floats(d, 2.0f);
  const auto cos = random_floats(t * head_dim / 2, 1.0f), sin = random_floats(t * head_dim / 2, 1.0f);
  const Matrix query(q, d, false), key(kv_heads * head_dim, d, false), value(kv_heads * head_dim, d, false);
  const Matrix output(d, q, false), gate(f, d, false), up(f, d, false), down(d, f, false);
  const auto router = random_floats(e * d, 0.1f), bias = random_floats(e, 0.3f);
  const auto gate_up = random_tiles(e * ef / 16, d, 128, false), expert_down = random_tiles(e * d / 32, ef, 128, false);
  args.x = x.get();
  args.attention_norm = norm.get();
  args.feed_forward_norm = other_norm.get();
  args.cos = cos.get();
  args.sin = sin.get();
  args.query = query.get();
  args.key = key.get();
  args.value = value.get();
  args.output = output.get();
  args.gate = gate.get();
  args.up = up.get();
  args.down = down.get();
  args.experts.num_experts = e;
  args.experts.expert_dim = ef;
  args.experts.top_k = e == 0 ? 0 : between(1, e);
  args.experts.route_scale = 2.5f;
  args.experts.router = router.get();
  args.experts.bias = bias.get();
  args.experts.gate_up = gate_up.get();
  args.experts.down = expert_down.get();
  const int32_t type = static_cast<int32_t>(between(0, 2));
  const int64_t num_blocks = (args.start + t + 63) / 64, cached = args.start * kv_heads * head_dim;
  const int64_t block_bytes = 128 * head_dim * (type == MOBILEMOE_FP32 ? 4 : type == MOBILEMOE_BF16 ? 2 : 1) +
                              (type == MOBILEMOE_INT8 ? 512 : 0);
  const int64_t cache_bytes = kv_heads * num_blocks * block_bytes, out_bytes = t * d * 4;
  const auto keys = random_floats(cached, 1.0f), values = random_floats(cached, 1.0f);
  // The output, then the cache, which holds what came before.
  const auto run = [&](void* out, bool as_operators) {
    args.out = static_cast<float*>(out);
    args.cache = {type, kv_heads, head_dim, num_blocks, static_cast<char*>(out) + out_bytes};
    mobilemoe_update_cache(&args.cache, 0, args.start, keys.get(), values.get(), 1);
    return as_operators ? run_operators(args) : mobilemoe_decoder_layer(&args, between(1, 3));
  };
  auto expected = buffer<uint8_t>(out_bytes + cache_bytes), result = buffer<uint8_t>(out_bytes + cache_bytes);
  const bool good = agree(out_bytes + cache_bytes, [&](void* out) { return run(out, false); }) &&
                    run(result.get(), false) == MOBILEMOE_OK && run(expected.get(), true) == MOBILEMOE_OK &&
                    std::memcmp(expected.get(), result.get(), out_bytes + cache_bytes) == 0;
  if (!good) {
    std::printf("layer T=%lld at %lld, D=%lld E=%lld: %s\n", (long long)t, (long long)args.start, (long long)d,
                (long long)e, mobilemoe_last_error());
  }
  // One bad argument: refused, and nothing is touched.
  switch (random_bits() % 5) {
    case 0:
      args.start = num_blocks * 64 + 1;
      break;
    case 1:
      ++args.key.out_features;
      break;
    case 2:
      args.cache.type = 3;
      break;
    case 3:
      args.down.out_features += 32;
      break;
    case 4:
      args.query.tiles = nullptr;
      break;
  }
  return good && mobilemoe_decoder_layer(&args, 2) == MOBILEMOE_BAD_ARGUMENT &&
         std::memcmp(expected.get(), args.out, out_bytes + cache_bytes) == 0;
}

bool fuzz_rows() {
  const int64_t t = between(0, 40), d = 32 * between(1, 9), vocab = between(1, 50);
  const auto x = random_floats(t * d, 10.0f), weight = random_floats(d, 2.0f);
  const Matrix table(vocab, d, random_bits() % 4 == 0);
  auto tokens = buffer<int64_t>(t);
  for (int64_t i = 0; i < t; ++i) tokens[i] = between(0, vocab - 1);
  const auto embed = [&](void* out) {
    const mobilemoe_matrix matrix = table.get();
    return mobilemoe_embedding(tokens.get(), &matrix, t, d, static_cast<float*>(out), between(1, 3));
  };
  const bool good = agree(t * d * 4, embed) && agree(t * d * 4, [&](void* out) {
                      return mobilemoe_rms_norm(x.get(), weight.get(), t, d, 1e-5f, static_cast<float*>(out),
                                                between(1, 3));
                    });
  if (!good) std::printf("rows T=%lld D=%lld\n", (long long)t, (long long)d);
  if (t == 0) return good;
  tokens[between(0, t - 1)] = random_bits() % 2 == 0 ? vocab : -1;
  auto out = buffer<float>(t * d);
  return good && embed(out.get()) == MOBILEMOE_BAD_ARGUMENT;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int64_t num_shapes = std::atoll(argv[1]);
  state = std::atoll(argv[2]);
  for (int64_t i = 0; i < num_shapes; ++i) {
    bool (*const fuzz[])() = {fuzz_moe_ffn, fuzz_moe_ffn, fuzz_moe_ffn,          fuzz_layer,
                              fuzz_linear,  fuzz_mlp,     fuzz_attention_inputs, fuzz_attention,
                              fuzz_layer,   fuzz_rows};
    if (!fuzz[i % 10]()) {
      std::printf("shape %lld of seed %s failed\n", (long long)i, argv[2]);
      return 1;
    }
  }
  for (const char* name : kIsas) {
    if (mobilemoe_set_isa(name) == MOBILEMOE_OK) std::printf("%s ", name);
  }
  std::printf("agree: %lld shapes, checksum %016llx\n", (long long)num_shapes, (unsigned long long)checksum);
  return 0;
}
