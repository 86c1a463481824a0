// The kernels as ExecuTorch operators.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "mobilemoe.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using TensorList = executorch::aten::ArrayRef<Tensor>;

// As many threads as ExecuTorch's pool has, but not its own: they sleep between operators, which in decoding takes as
// long as the operators.
int64_t num_threads() { return static_cast<int64_t>(executorch::extension::get_thread_count()); }

// Whether a tensor is dense and of this type and shape.
bool fits(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (tensor.scalar_type() != dtype || tensor.dim() != static_cast<ssize_t>(shape.size()) ||
      !executorch::runtime::tensor_is_default_dim_order(tensor)) {
    return false;
  }
  ssize_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

// Bytes of 32 outputs' weights for each input (isa.h).
constexpr int64_t kInputBytes = 18;

// Router, bias and experts of inputs of width d: everything but x and out.
bool to_experts(const Tensor& router, const Tensor& bias, const Tensor& gate_up, const Tensor& down, int64_t d,
                mobilemoe_moe_ffn_args& args) {
  if (gate_up.dim() != 3) return false;
  const int64_t e = gate_up.size(0), f = gate_up.size(1) * 32;
  if (!fits(router, ScalarType::Float, {e, d}) || !fits(bias, ScalarType::Float, {e}) ||
      !fits(gate_up, ScalarType::Byte, {e, f / 32, 2 * d * kInputBytes}) ||
      !fits(down, ScalarType::Byte, {e, d / 32, f * kInputBytes})) {
    return false;
  }
  args.dim = d;
  args.expert_dim = f;
  args.num_experts = e;
  args.dtype = MOBILEMOE_FP32;
  args.router = router.const_data_ptr<float>();
  args.bias = bias.const_data_ptr<float>();
  args.gate_up = gate_up.const_data_ptr<uint8_t>();
  args.down = down.const_data_ptr<uint8_t>();
  return true;
}

// Tiles [out_features / 32, in_features / 32, 576] of a linear.
bool to_matrix(const Tensor& tiles, int64_t out_features, int64_t in_features, mobilemoe_matrix& matrix) {
  if (!fits(tiles, ScalarType::Byte, {(out_features + 31) / 32, in_features / 32, 32 * kInputBytes})) return false;
  matrix = {tiles.const_data_ptr<uint8_t>(), out_features};
  return true;
}

// The number of inputs of tiles, or 0.
int64_t inputs_of(const Tensor& tiles) { return tiles.dim() == 3 ? tiles.size(1) * 32 : 0; }

Tensor& int4_linear_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& tiles, int64_t out_features,
                        Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, x.dim() > 0, InvalidArgument, out, "mobilemoe::int4_linear: x is [..., K]");
  const int64_t k = x.size(x.dim() - 1);
  executorch::aten::SizesType shape[executorch::runtime::kTensorDimensionLimit];
  for (ssize_t i = 0; i < x.dim(); ++i) shape[i] = x.size(i);
  shape[x.dim() - 1] = out_features;
  mobilemoe_matrix matrix = {};
  ET_KERNEL_CHECK_MSG(context,
                      x.scalar_type() == ScalarType::Float && executorch::runtime::tensor_is_default_dim_order(x) &&
                          to_matrix(tiles, out_features, k, matrix),
                      InvalidArgument, out,
                      "mobilemoe::int4_linear: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context,
                      executorch::runtime::resize_tensor(out, {shape, static_cast<size_t>(x.dim())}) == Error::Ok,
                      InvalidArgument, out, "mobilemoe::int4_linear: out is too small");
  mobilemoe_linear_args args = {};
  args.num_tokens = k == 0 ? 0 : x.numel() / k;
  args.in_features = k;
  args.out_features = out_features;
  args.dtype = MOBILEMOE_FP32;
  args.x = x.const_data_ptr();
  args.tiles = matrix.tiles;
  args.out = out.mutable_data_ptr();
  ET_KERNEL_CHECK_MSG(context, mobilemoe_linear(&args, num_threads()) == MOBILEMOE_OK, InvalidArgument, out,
                      "mobilemoe::int4_linear: %s", mobilemoe_last_error());
  return out;
}

// x as FP32 rows.
bool is_rows(const Tensor& x) {
  return x.dim() > 0 && x.size(x.dim() - 1) > 0 && x.scalar_type() == ScalarType::Float &&
         executorch::runtime::tensor_is_default_dim_order(x);
}

Tensor& rms_norm_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, is_rows(x) && fits(weight, ScalarType::Float, {x.size(x.dim() - 1)}), InvalidArgument,
                      out, "mobilemoe::rms_norm: x and weight are FP32, as wide as each other");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "mobilemoe::rms_norm: out is smaller than x");
  const int64_t dim = x.size(x.dim() - 1);
  const int status = mobilemoe_rms_norm(x.const_data_ptr<float>(), weight.const_data_ptr<float>(), x.numel() / dim,
                                        dim, static_cast<float>(eps), out.mutable_data_ptr<float>(), num_threads());
  ET_KERNEL_CHECK_MSG(context, status == MOBILEMOE_OK, InvalidArgument, out, "mobilemoe::rms_norm: %s",
                      mobilemoe_last_error());
  return out;
}

// A cache [KV heads, blocks, bytes], whose type follows from its bytes.
bool to_cache(const Tensor& tensor, int64_t head_dim, mobilemoe_cache& cache) {
  if (tensor.dim() != 3 || !fits(tensor, ScalarType::Byte, {tensor.size(0), tensor.size(1), tensor.size(2)})) {
    return false;
  }
  const int type = mobilemoe_cache_type(head_dim, tensor.size(2));
  cache = {type, tensor.size(0), head_dim, tensor.size(1), const_cast<void*>(tensor.const_data_ptr())};
  return type >= 0;
}

// A layer over x [1, T, D]: `attention` is a norm, query, key, value and output; `feed_forward` a norm, gate, up and
// down; `experts` is empty, or router, bias, and the experts' weights.
Tensor& decoder_layer_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& cos, const Tensor& sin,
                          Tensor& cache, int64_t start, TensorList attention, TensorList feed_forward,
                          TensorList experts, int64_t top_k, double route_scale, double eps, Tensor& out) {
  mobilemoe_layer_args args = {};
  const bool is_layer = is_rows(x) && x.dim() == 3 && x.size(0) == 1 && cos.dim() == 3 && attention.size() == 5 &&
                        feed_forward.size() == 4 && (experts.empty() || experts.size() == 4);
  const int64_t t = is_layer ? x.size(1) : 0, d = is_layer ? x.size(2) : 0, half = is_layer ? cos.size(2) : 0;
  const int64_t queries = is_layer ? inputs_of(attention[4]) : 0, hidden = is_layer ? inputs_of(feed_forward[3]) : 0;
  const int64_t keys = is_layer && cache.dim() == 3 ? cache.size(0) * 2 * half : 0;
  ET_KERNEL_CHECK_MSG(
      context,
      is_layer && fits(cos, ScalarType::Float, {1, t, half}) && fits(sin, ScalarType::Float, {1, t, half}) &&
          to_cache(cache, 2 * half, args.cache) && fits(attention[0], ScalarType::Float, {d}) &&
          to_matrix(attention[1], queries, d, args.query) && to_matrix(attention[2], keys, d, args.key) &&
          to_matrix(attention[3], keys, d, args.value) && to_matrix(attention[4], d, queries, args.output) &&
          fits(feed_forward[0], ScalarType::Float, {d}) && to_matrix(feed_forward[1], hidden, d, args.gate) &&
          to_matrix(feed_forward[2], hidden, d, args.up) && to_matrix(feed_forward[3], d, hidden, args.down) &&
          (experts.empty() || to_experts(experts[0], experts[1], experts[2], experts[3], d, args.experts)),
      InvalidArgument, out, "mobilemoe::decoder_layer: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "mobilemoe::decoder_layer: out is smaller than x");
  args.num_tokens = t;
  args.start = start;
  args.dim = d;
  args.eps = static_cast<float>(eps);
  args.x = x.const_data_ptr<float>();
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  args.attention_norm = attention[0].const_data_ptr<float>();
  args.feed_forward_norm = feed_forward[0].const_data_ptr<float>();
  args.experts.top_k = experts.empty() ? 0 : top_k;
  args.experts.route_scale = static_cast<float>(route_scale);
  args.out = out.mutable_data_ptr<float>();
  ET_KERNEL_CHECK_MSG(context, mobilemoe_decoder_layer(&args, num_threads()) == MOBILEMOE_OK, InvalidArgument, out,
                      "mobilemoe::decoder_layer: %s", mobilemoe_last_error());
  return out;
}

Tensor& int4_embedding_out(KernelRuntimeContext& context, const Tensor& tokens, const Tensor& tiles,
                           int64_t num_embeddings, Tensor& out) {
  const int64_t dim = inputs_of(tiles);
  mobilemoe_matrix table = {};
  ET_KERNEL_CHECK_MSG(
      context,
      dim > 0 && tokens.dim() + 1 < static_cast<ssize_t>(executorch::runtime::kTensorDimensionLimit) &&
          tokens.scalar_type() == ScalarType::Long && executorch::runtime::tensor_is_default_dim_order(tokens) &&
          to_matrix(tiles, num_embeddings, dim, table),
      InvalidArgument, out, "mobilemoe::int4_embedding: the types or shapes of its inputs do not belong together");
  executorch::aten::SizesType shape[executorch::runtime::kTensorDimensionLimit];
  for (ssize_t i = 0; i < tokens.dim(); ++i) shape[i] = tokens.size(i);
  shape[tokens.dim()] = dim;
  ET_KERNEL_CHECK_MSG(
      context, executorch::runtime::resize_tensor(out, {shape, static_cast<size_t>(tokens.dim()) + 1}) == Error::Ok,
      InvalidArgument, out, "mobilemoe::int4_embedding: out is too small");
  const int status = mobilemoe_embedding(tokens.const_data_ptr<int64_t>(), &table, tokens.numel(), dim,
                                         out.mutable_data_ptr<float>(), num_threads());
  ET_KERNEL_CHECK_MSG(context, status == MOBILEMOE_OK, InvalidArgument, out, "mobilemoe::int4_embedding: %s",
                      mobilemoe_last_error());
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(mobilemoe, "int4_linear.out", int4_linear_out);
EXECUTORCH_LIBRARY(mobilemoe, "int4_embedding.out", int4_embedding_out);
EXECUTORCH_LIBRARY(mobilemoe, "rms_norm.out", rms_norm_out);
EXECUTORCH_LIBRARY(mobilemoe, "decoder_layer.out", decoder_layer_out);
