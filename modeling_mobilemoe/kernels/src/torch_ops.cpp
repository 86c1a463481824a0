// The kernels as PyTorch operators on the CPU. They have no backward.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "mobilemoe.h"

namespace {

using at::Tensor;

int32_t dtype_of(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name, " is ",
                    tensor.scalar_type(), ", the kernels take FP32 and BF16. Convert it first.");
  return tensor.scalar_type() == at::kFloat ? MOBILEMOE_FP32 : MOBILEMOE_BF16;
}

// The address of a tensor, after a check that it is what the kernels will take it for.
const void* address(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.sizes() == shape && tensor.is_contiguous(), name, " is ",
                    tensor.scalar_type(), " ", tensor.sizes(), tensor.is_contiguous() ? "" : ", not contiguous",
                    ", the kernel needs a contiguous ", dtype, " ", shape, ". Convert it first.");
  return tensor.const_data_ptr();
}

void check(int status) { TORCH_CHECK_VALUE(status == MOBILEMOE_OK, "mobilemoe: ", mobilemoe_last_error(), "."); }

// Bytes of 32 outputs' weights for each input (src/isa.h).
constexpr int64_t kInputBytes = 18;

// What both entries to the experts share: gate_up [E, F / 32, 2 * D * 18] and down [E, D / 32, F * 18].
mobilemoe_moe_ffn_args experts(const Tensor& x, const Tensor& gate_up, const Tensor& down, Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x is ", x.sizes(), ", the kernel needs [tokens, dim].");
  TORCH_CHECK_VALUE(gate_up.dim() == 3, "gate_up is ", gate_up.sizes(),
                    ", the kernel needs [experts, expert_dim / 32, 2 * dim * 18].");
  mobilemoe_moe_ffn_args args = {};
  args.num_tokens = x.size(0);
  args.dim = x.size(1);
  args.expert_dim = gate_up.size(1) * 32;
  args.num_experts = gate_up.size(0);
  args.dtype = dtype_of(x, "x");
  const int64_t e = args.num_experts, d = args.dim, f = args.expert_dim;
  args.x = address(x, "x", x.scalar_type(), x.sizes());
  args.gate_up = static_cast<const uint8_t*>(address(gate_up, "gate_up", at::kByte, {e, f / 32, 2 * d * kInputBytes}));
  args.down = static_cast<const uint8_t*>(address(down, "down", at::kByte, {e, d / 32, f * kInputBytes}));
  args.out = out.mutable_data_ptr();
  return args;
}

// Tiles [out_features / 32, in_features / 32, 576] of a linear.
mobilemoe_matrix matrix(const Tensor& tiles, int64_t out_features, int64_t in_features, const char* name) {
  const int64_t shape[] = {(out_features + 31) / 32, in_features / 32, 32 * kInputBytes};
  return {static_cast<const uint8_t*>(address(tiles, name, at::kByte, shape)), out_features};
}

// The number of inputs of tiles, and of outputs where these are a multiple of 32.
int64_t inputs_of(const Tensor& tiles, const char* name) {
  TORCH_CHECK_VALUE(tiles.dim() == 3, name, " is ", tiles.sizes(), ", the kernel needs [out / 32, in / 32, 576].");
  return tiles.size(1) * 32;
}

Tensor moe_ffn(const Tensor& x, const Tensor& router, const Tensor& bias, const Tensor& gate_up, const Tensor& down,
               int64_t top_k, double route_scale) {
  Tensor out = at::empty(x.sizes(), x.options());
  mobilemoe_moe_ffn_args args = experts(x, gate_up, down, out);
  args.top_k = top_k;
  args.route_scale = static_cast<float>(route_scale);
  args.router = static_cast<const float*>(address(router, "router", at::kFloat, {args.num_experts, args.dim}));
  args.bias = static_cast<const float*>(address(bias, "bias", at::kFloat, {args.num_experts}));
  check(mobilemoe_moe_ffn(&args, at::get_num_threads()));
  return out;
}

Tensor moe_experts(const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights, const Tensor& gate_up,
                   const Tensor& down) {
  Tensor out = at::empty(x.sizes(), x.options());
  mobilemoe_moe_ffn_args args = experts(x, gate_up, down, out);
  args.top_k = top_k_index.size(-1);
  const int64_t shape[] = {args.num_tokens, args.top_k};
  args.weights_dtype = dtype_of(top_k_weights, "top_k_weights");
  args.top_k_index = static_cast<const int64_t*>(address(top_k_index, "top_k_index", at::kLong, shape));
  args.top_k_weights = address(top_k_weights, "top_k_weights", top_k_weights.scalar_type(), shape);
  check(mobilemoe_moe_ffn(&args, at::get_num_threads()));
  return out;
}

Tensor int4_linear(const Tensor& x, const Tensor& tiles, int64_t out_features) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x is ", x.sizes(), ", the kernel needs [..., in].");
  mobilemoe_linear_args args = {};
  args.in_features = x.size(-1);
  args.out_features = out_features;
  args.num_tokens = args.in_features == 0 ? 0 : x.numel() / args.in_features;
  args.dtype = dtype_of(x, "x");
  args.x = address(x, "x", x.scalar_type(), x.sizes());
  args.tiles = matrix(tiles, out_features, args.in_features, "the weight").tiles;
  at::DimVector shape(x.sizes());
  shape.back() = out_features;
  Tensor out = at::empty(shape, x.options());
  args.out = out.mutable_data_ptr();
  check(mobilemoe_linear(&args, at::get_num_threads()));
  return out;
}

// weights are gate, up and down.
Tensor mlp(const Tensor& x, at::TensorList weights) {
  TORCH_CHECK_VALUE(weights.size() == 3, "weights has ", weights.size(), " tensors, the kernel needs 3.");
  TORCH_CHECK_VALUE(x.dim() > 0, "x is ", x.sizes(), ", the kernel needs [..., dim].");
  const int64_t hidden = inputs_of(weights[2], "down");
  mobilemoe_mlp_args args = {};
  args.dim = x.size(-1);
  args.num_tokens = args.dim == 0 ? 0 : x.numel() / args.dim;
  args.dtype = dtype_of(x, "x");
  args.x = address(x, "x", x.scalar_type(), x.sizes());
  args.gate = matrix(weights[0], hidden, args.dim, "gate");
  args.up = matrix(weights[1], hidden, args.dim, "up");
  args.down = matrix(weights[2], args.dim, hidden, "down");
  Tensor out = at::empty(x.sizes(), x.options());
  args.out = out.mutable_data_ptr();
  check(mobilemoe_mlp(&args, at::get_num_threads()));
  return out;
}

// A layer's whole feed-forward: routed experts and the shared one.
Tensor feed_forward(const Tensor& x, const Tensor& router, const Tensor& bias, const Tensor& gate_up,
                    const Tensor& down, int64_t top_k, double route_scale, at::TensorList shared) {
  const Tensor tokens = x.reshape({-1, x.size(-1)});
  Tensor out = moe_ffn(tokens, router, bias, gate_up, down, top_k, route_scale);
  return out.add_(mlp(tokens, shared)).view(x.sizes());
}

// Queries, keys and values [B, T, heads, D] of x [B, T, H].
std::tuple<Tensor, Tensor, Tensor> attention_inputs(const Tensor& x, at::TensorList qkv, int64_t num_heads,
                                                    int64_t num_kv_heads, const Tensor& cos, const Tensor& sin,
                                                    double eps) {
  TORCH_CHECK_VALUE(qkv.size() == 3, "qkv has ", qkv.size(), " tensors, the kernel needs 3.");
  TORCH_CHECK_VALUE(x.dim() == 3 && cos.dim() == 3 && cos.size(2) > 0, "x is ", x.sizes(), " and cos ", cos.sizes(),
                    ", the kernel needs [batch, tokens, hidden] and [batch, tokens, head_dim / 2].");
  const int64_t batch = x.size(0), length = x.size(1);
  // A batch may share its positions.
  const at::DimVector angles = {batch, length, cos.size(2)};
  const Tensor all_cos = cos.expand(angles).contiguous(), all_sin = sin.expand(angles).contiguous();
  mobilemoe_attention_inputs_args args = {};
  args.num_tokens = batch * length;
  args.dim = x.size(2);
  args.head_dim = 2 * cos.size(2);
  args.eps = static_cast<float>(eps);
  args.dtype = dtype_of(x, "x");
  args.x = address(x, "x", x.scalar_type(), x.sizes());
  args.query = matrix(qkv[0], num_heads * args.head_dim, args.dim, "query");
  args.key = matrix(qkv[1], num_kv_heads * args.head_dim, args.dim, "key");
  args.value = matrix(qkv[2], num_kv_heads * args.head_dim, args.dim, "value");
  args.cos = static_cast<const float*>(address(all_cos, "cos", at::kFloat, angles));
  args.sin = static_cast<const float*>(address(all_sin, "sin", at::kFloat, angles));
  const auto empty = [&](int64_t heads) { return at::empty({batch, length, heads, args.head_dim}, x.options()); };
  Tensor query = empty(num_heads), key = empty(num_kv_heads), value = empty(num_kv_heads);
  args.query_out = query.mutable_data_ptr();
  args.key_out = key.mutable_data_ptr();
  args.value_out = value.mutable_data_ptr();
  check(mobilemoe_attention_inputs(&args, at::get_num_threads()));
  return {query, key, value};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x is ", x.sizes(), ", the kernel needs [..., dim].");
  const int64_t dim = x.size(-1);
  Tensor out = at::empty(x.sizes(), x.options());
  check(mobilemoe_rms_norm(static_cast<const float*>(address(x, "x", at::kFloat, x.sizes())),
                           static_cast<const float*>(address(weight, "weight", at::kFloat, {dim})),
                           dim == 0 ? 0 : x.numel() / dim, dim, static_cast<float>(eps), out.mutable_data_ptr<float>(),
                           at::get_num_threads()));
  return out;
}

// A cache [KV heads, blocks, bytes], whose type follows from its bytes.
mobilemoe_cache cache_of(const Tensor& cache, int64_t head_dim) {
  TORCH_CHECK_VALUE(cache.dim() == 3 && cache.scalar_type() == at::kByte && cache.is_contiguous(), "cache is ",
                    cache.scalar_type(), " ", cache.sizes(),
                    ", the kernel needs contiguous bytes [heads, blocks, bytes of a block].");
  const int type = mobilemoe_cache_type(head_dim, cache.size(2));
  TORCH_CHECK_VALUE(type >= 0, "blocks of ", cache.size(2), " bytes hold no heads of ", head_dim,
                    ": neither FP32, BF16 nor INT8.");
  return {type, cache.size(0), head_dim, cache.size(1), cache.mutable_data_ptr()};
}

// key and value [1, T, KV heads, D]; what it returns has no meaning.
Tensor update_cache(const Tensor& key, const Tensor& value, Tensor& cache, int64_t start) {
  TORCH_CHECK_VALUE(key.dim() == 4 && key.size(0) == 1, "key is ", key.sizes(),
                    ", the kernel needs [1, tokens, heads, head_dim].");
  const mobilemoe_cache to = cache_of(cache, key.size(3));
  const int64_t shape[] = {1, key.size(1), to.num_kv_heads, to.head_dim};
  check(mobilemoe_update_cache(
      &to, start, key.size(1), static_cast<const float*>(address(key, "key", at::kFloat, shape)),
      static_cast<const float*>(address(value, "value", at::kFloat, shape)), at::get_num_threads()));
  return at::empty({1}, key.options());
}

// query [1, T, heads, D] over a cache that holds its keys and values from position `start` on.
Tensor attention(const Tensor& query, const Tensor& cache, int64_t start) {
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(0) == 1, "query is ", query.sizes(),
                    ", the kernel needs [1, tokens, heads, head_dim].");
  mobilemoe_attention_args args = {};
  args.num_tokens = query.size(1);
  args.start = start;
  args.num_heads = query.size(2);
  args.query = static_cast<const float*>(address(query, "query", at::kFloat, query.sizes()));
  args.cache = cache_of(cache, query.size(3));
  Tensor out = at::empty(query.sizes(), query.options());
  args.out = out.mutable_data_ptr<float>();
  check(mobilemoe_attention(&args, at::get_num_threads()));
  return out;
}

// A layer over [1, T, D]: `attention` is a norm, query, key, value and output; `feed_forward` a norm, gate, up and
// down; `experts` is empty, or router, bias, and the experts' weights. Inside it, all is in FP32.
Tensor decoder_layer(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& cache, int64_t start,
                     at::TensorList attention, at::TensorList feed_forward, at::TensorList experts_of_layer,
                     int64_t top_k, double route_scale, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == 1 && cos.dim() == 3, "x is ", x.sizes(), " and cos ", cos.sizes(),
                    ", the kernel needs [1, tokens, dim] and [1, tokens, head_dim / 2].");
  TORCH_CHECK_VALUE(
      attention.size() == 5 && feed_forward.size() == 4 && (experts_of_layer.empty() || experts_of_layer.size() == 4),
      "attention, feed_forward and experts have ", attention.size(), ", ", feed_forward.size(), " and ",
      experts_of_layer.size(), " tensors, the kernel needs 5, 4, and 4 or none.");
  dtype_of(x, "x");
  const int64_t d = x.size(2), half = cos.size(2);
  const int64_t angles[] = {1, x.size(1), half};
  const auto converted = [](const Tensor& tensor) {
    return tensor.scalar_type() == at::kBFloat16 ? tensor.to(at::kFloat) : tensor;
  };
  const Tensor inputs = converted(x), attention_norm = converted(attention[0]),
               feed_forward_norm = converted(feed_forward[0]);
  const auto floats = [](const Tensor& tensor, const char* name, at::IntArrayRef shape) {
    return static_cast<const float*>(address(tensor, name, at::kFloat, shape));
  };
  mobilemoe_layer_args args = {};
  args.num_tokens = x.size(1);
  args.start = start;
  args.dim = d;
  args.eps = static_cast<float>(eps);
  args.x = floats(inputs, "x", x.sizes());
  args.cos = floats(cos, "cos", angles);
  args.sin = floats(sin, "sin", angles);
  args.cache = cache_of(cache, 2 * half);
  args.attention_norm = floats(attention_norm, "the attention's norm", {d});
  const int64_t queries = inputs_of(attention[4], "output"), keys = args.cache.num_kv_heads * args.cache.head_dim;
  args.query = matrix(attention[1], queries, d, "query");
  args.key = matrix(attention[2], keys, d, "key");
  args.value = matrix(attention[3], keys, d, "value");
  args.output = matrix(attention[4], d, queries, "output");
  args.feed_forward_norm = floats(feed_forward_norm, "the feed-forward's norm", {d});
  const int64_t hidden = inputs_of(feed_forward[3], "down");
  args.gate = matrix(feed_forward[1], hidden, d, "gate");
  args.up = matrix(feed_forward[2], hidden, d, "up");
  args.down = matrix(feed_forward[3], d, hidden, "down");
  Tensor out = at::empty(x.sizes(), inputs.options());
  if (!experts_of_layer.empty()) {
    args.experts = experts(inputs.view({-1, d}), experts_of_layer[2], experts_of_layer[3], out);
    args.experts.top_k = top_k;
    args.experts.route_scale = static_cast<float>(route_scale);
    args.experts.router = floats(experts_of_layer[0], "router", {args.experts.num_experts, d});
    args.experts.bias = floats(experts_of_layer[1], "bias", {args.experts.num_experts});
  }
  args.out = out.mutable_data_ptr<float>();
  check(mobilemoe_decoder_layer(&args, at::get_num_threads()));
  return out.to(x.scalar_type());
}

Tensor int4_embedding(const Tensor& tokens, const Tensor& tiles, int64_t num_embeddings) {
  const int64_t dim = inputs_of(tiles, "the table");
  const mobilemoe_matrix table = matrix(tiles, num_embeddings, dim, "the table");
  at::DimVector shape(tokens.sizes());
  shape.push_back(dim);
  Tensor out = at::empty(shape, tokens.options().dtype(at::kFloat));
  check(mobilemoe_embedding(static_cast<const int64_t*>(address(tokens, "tokens", at::kLong, tokens.sizes())), &table,
                            tokens.numel(), dim, out.mutable_data_ptr<float>(), at::get_num_threads()));
  return out;
}

}  // namespace

// Declared in kernels/__init__.py.
TORCH_LIBRARY_IMPL(mobilemoe, CPU, library) {
  library.impl("moe_ffn", moe_ffn);
  library.impl("moe_experts", moe_experts);
  library.impl("int4_linear", int4_linear);
  library.impl("int4_embedding", int4_embedding);
  library.impl("mlp", mlp);
  library.impl("update_cache", update_cache);
  library.impl("attention", attention);
  library.impl("rms_norm", rms_norm);
  library.impl("decoder_layer", decoder_layer);
  library.impl("feed_forward", feed_forward);
  library.impl("attention_inputs", attention_inputs);
}
