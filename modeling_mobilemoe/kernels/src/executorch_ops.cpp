// The kernels as ExecuTorch operators.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstring>

#include "mobilemoe.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using executorch::runtime::internal::EventTracerProfileOpScope;
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

Tensor& moe_ffn_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& router, const Tensor& bias,
                    const Tensor& gate_up_qweight, const Tensor& gate_up_scale, const Tensor& down_qweight,
                    const Tensor& down_scale, int64_t top_k, double route_scale, Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, x.dim() == 2 && gate_up_qweight.dim() == 3, InvalidArgument, out,
                      "mobilemoe::moe_ffn: x is [T, D] and gate_up_qweight [E, D, F]");
  const int64_t t = x.size(0), d = x.size(1), e = gate_up_qweight.size(0), f = gate_up_qweight.size(2);
  ET_KERNEL_CHECK_MSG(
      context,
      fits(x, ScalarType::Float, {t, d}) && fits(router, ScalarType::Float, {e, d}) &&
          fits(bias, ScalarType::Float, {e}) && fits(gate_up_qweight, ScalarType::Byte, {e, d, f}) &&
          fits(gate_up_scale, ScalarType::Half, {e, d, f / 16}) &&
          fits(down_qweight, ScalarType::Byte, {e, f, d / 2}) && fits(down_scale, ScalarType::Half, {e, f, d / 32}),
      InvalidArgument, out, "mobilemoe::moe_ffn: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "mobilemoe::moe_ffn: out is smaller than x");
  mobilemoe_moe_ffn_args args = {};
  args.num_tokens = t;
  args.dim = d;
  args.expert_dim = f;
  args.num_experts = e;
  args.top_k = top_k;
  args.route_scale = static_cast<float>(route_scale);
  args.dtype = MOBILEMOE_FP32;
  args.x = x.const_data_ptr();
  args.router = router.const_data_ptr<float>();
  args.bias = bias.const_data_ptr<float>();
  args.gate_up_qweight = gate_up_qweight.const_data_ptr<uint8_t>();
  args.gate_up_scale = static_cast<const uint16_t*>(gate_up_scale.const_data_ptr());
  args.down_qweight = down_qweight.const_data_ptr<uint8_t>();
  args.down_scale = static_cast<const uint16_t*>(down_scale.const_data_ptr());
  args.out = out.mutable_data_ptr();
  ET_KERNEL_CHECK_MSG(context, mobilemoe_moe_ffn(&args, num_threads()) == MOBILEMOE_OK, InvalidArgument, out,
                      "mobilemoe::moe_ffn: %s", mobilemoe_last_error());
  return out;
}

Tensor& int4_linear_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& qweight, const Tensor& scale,
                        Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, x.dim() > 0 && qweight.dim() == 2, InvalidArgument, out,
                      "mobilemoe::int4_linear: x is [..., K] and qweight [N, K / 2]");
  const int64_t k = x.size(x.dim() - 1), n = qweight.size(0);
  executorch::aten::SizesType shape[executorch::runtime::kTensorDimensionLimit];
  for (ssize_t i = 0; i < x.dim(); ++i) shape[i] = x.size(i);
  shape[x.dim() - 1] = n;
  ET_KERNEL_CHECK_MSG(context,
                      x.scalar_type() == ScalarType::Float && executorch::runtime::tensor_is_default_dim_order(x) &&
                          fits(qweight, ScalarType::Byte, {n, k / 2}) && fits(scale, ScalarType::Half, {n, k / 32}),
                      InvalidArgument, out,
                      "mobilemoe::int4_linear: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context,
                      executorch::runtime::resize_tensor(out, {shape, static_cast<size_t>(x.dim())}) == Error::Ok,
                      InvalidArgument, out, "mobilemoe::int4_linear: out is too small");
  mobilemoe_linear_args args = {};
  args.num_tokens = k == 0 ? 0 : x.numel() / k;
  args.in_features = k;
  args.out_features = n;
  args.dtype = MOBILEMOE_FP32;
  args.x = x.const_data_ptr();
  args.qweight = qweight.const_data_ptr<uint8_t>();
  args.scale = static_cast<const uint16_t*>(scale.const_data_ptr());
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

// A packed linear with its scales, as two tensors of a list.
bool to_matrix(const TensorList& weights, size_t at, int64_t in_features, mobilemoe_matrix& matrix) {
  const Tensor &qweight = weights[at], &scale = weights[at + 1];
  if (qweight.dim() != 2) return false;
  const int64_t n = qweight.size(0);
  if (!fits(qweight, ScalarType::Byte, {n, in_features / 2}) || !fits(scale, ScalarType::Half, {n, in_features / 32})) {
    return false;
  }
  matrix = {qweight.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(scale.const_data_ptr()), n};
  return true;
}

Tensor& mlp_out(KernelRuntimeContext& context, const Tensor& x, TensorList weights, Tensor& out) {
  mobilemoe_mlp_args args = {};
  args.dim = is_rows(x) ? x.size(x.dim() - 1) : 0;
  ET_KERNEL_CHECK_MSG(context,
                      args.dim > 0 && weights.size() == 6 && to_matrix(weights, 0, args.dim, args.gate) &&
                          to_matrix(weights, 2, args.dim, args.up) &&
                          to_matrix(weights, 4, args.gate.out_features, args.down),
                      InvalidArgument, out, "mobilemoe::mlp: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "mobilemoe::mlp: out is smaller than x");
  args.num_tokens = x.numel() / args.dim;
  args.dtype = MOBILEMOE_FP32;
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  ET_KERNEL_CHECK_MSG(context, mobilemoe_mlp(&args, num_threads()) == MOBILEMOE_OK, InvalidArgument, out,
                      "mobilemoe::mlp: %s", mobilemoe_last_error());
  return out;
}

Tensor& rms_norm_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, is_rows(x) && fits(weight, ScalarType::Float, {x.size(x.dim() - 1)}), InvalidArgument,
                      out, "mobilemoe::rms_norm: x and weight are FP32, as wide as each other");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, x.sizes()) == Error::Ok, InvalidArgument, out,
                      "mobilemoe::rms_norm: out is smaller than x");
  const int64_t dim = x.size(x.dim() - 1);
  const int status =
      mobilemoe_rms_norm(x.const_data_ptr<float>(), weight.const_data_ptr<float>(), x.numel() / dim, dim,
                         static_cast<float>(eps), out.mutable_data_ptr<float>(), num_threads());
  ET_KERNEL_CHECK_MSG(context, status == MOBILEMOE_OK, InvalidArgument, out, "mobilemoe::rms_norm: %s",
                      mobilemoe_last_error());
  return out;
}

// A cache [KV heads, blocks, bytes], whose type follows from its bytes.
bool to_cache(const Tensor& tensor, int64_t head_dim, mobilemoe_cache& cache) {
  if (tensor.dim() != 3 ||
      !fits(tensor, ScalarType::Byte, {tensor.size(0), tensor.size(1), tensor.size(2)})) {
    return false;
  }
  const int type = mobilemoe_cache_type(head_dim, tensor.size(2));
  cache = {type, tensor.size(0), head_dim, tensor.size(1), const_cast<void*>(tensor.const_data_ptr())};
  return type >= 0;
}

// Writes key and value [1, T, KV heads, head_dim] into the cache from position `start` on; out is not used.
Tensor& update_cache_out(KernelRuntimeContext& context, const Tensor& key, const Tensor& value, Tensor& cache,
                         int64_t start, Tensor& out) {
  mobilemoe_cache to = {};
  ET_KERNEL_CHECK_MSG(context,
                      key.dim() == 4 && to_cache(cache, key.size(3), to) &&
                          fits(key, ScalarType::Float, {1, key.size(1), to.num_kv_heads, to.head_dim}) &&
                          fits(value, ScalarType::Float, {1, key.size(1), to.num_kv_heads, to.head_dim}),
                      InvalidArgument, out,
                      "mobilemoe::update_cache: the types or shapes of its inputs do not belong together");
  const int status = mobilemoe_update_cache(&to, start, key.size(1), key.const_data_ptr<float>(),
                                            value.const_data_ptr<float>(), num_threads());
  ET_KERNEL_CHECK_MSG(context, status == MOBILEMOE_OK, InvalidArgument, out, "mobilemoe::update_cache: %s",
                      mobilemoe_last_error());
  return out;
}

Tensor& attention_out(KernelRuntimeContext& context, const Tensor& query, const Tensor& cache, int64_t start,
                      Tensor& out) {
  mobilemoe_attention_args args = {};
  ET_KERNEL_CHECK_MSG(context,
                      is_rows(query) && query.dim() == 4 && query.size(0) == 1 &&
                          to_cache(cache, query.size(3), args.cache),
                      InvalidArgument, out,
                      "mobilemoe::attention: the types or shapes of its inputs do not belong together");
  ET_KERNEL_CHECK_MSG(context, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument,
                      out, "mobilemoe::attention: out is smaller than the query");
  args.num_tokens = query.size(1);
  args.start = start;
  args.num_heads = query.size(2);
  args.query = query.const_data_ptr<float>();
  args.out = out.mutable_data_ptr<float>();
  ET_KERNEL_CHECK_MSG(context, mobilemoe_attention(&args, num_threads()) == MOBILEMOE_OK, InvalidArgument, out,
                      "mobilemoe::attention: %s", mobilemoe_last_error());
  return out;
}

Tensor& int4_embedding_out(KernelRuntimeContext& context, const Tensor& tokens, const Tensor& qweight,
                           const Tensor& scale, Tensor& out) {
  const int64_t dim = qweight.dim() == 2 ? 2 * qweight.size(1) : 0;
  ET_KERNEL_CHECK_MSG(context,
                      dim > 0 && tokens.dim() + 1 < static_cast<ssize_t>(executorch::runtime::kTensorDimensionLimit) &&
                          tokens.scalar_type() == ScalarType::Long &&
                          executorch::runtime::tensor_is_default_dim_order(tokens) &&
                          fits(qweight, ScalarType::Byte, {qweight.size(0), dim / 2}) &&
                          fits(scale, ScalarType::Half, {qweight.size(0), dim / 32}),
                      InvalidArgument, out,
                      "mobilemoe::int4_embedding: the types or shapes of its inputs do not belong together");
  executorch::aten::SizesType shape[executorch::runtime::kTensorDimensionLimit];
  for (ssize_t i = 0; i < tokens.dim(); ++i) shape[i] = tokens.size(i);
  shape[tokens.dim()] = dim;
  ET_KERNEL_CHECK_MSG(
      context, executorch::runtime::resize_tensor(out, {shape, static_cast<size_t>(tokens.dim()) + 1}) == Error::Ok,
      InvalidArgument, out, "mobilemoe::int4_embedding: out is too small");
  const int status = mobilemoe_embedding(tokens.const_data_ptr<int64_t>(), qweight.const_data_ptr<uint8_t>(),
                                         static_cast<const uint16_t*>(scale.const_data_ptr()), tokens.numel(), dim,
                                         qweight.size(0), out.mutable_data_ptr<float>(), num_threads());
  ET_KERNEL_CHECK_MSG(context, status == MOBILEMOE_OK, InvalidArgument, out, "mobilemoe::int4_embedding: %s",
                      mobilemoe_last_error());
  return out;
}

// Three outputs, which EXECUTORCH_LIBRARY's boxing does not take: (x, qkv, cos, sin, eps, query, key, value, returned).
void attention_inputs_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  const auto check = [&](bool good, const char* what) {
    if (!good) {
      ET_LOG(Error, "mobilemoe::attention_inputs: %s", what);
      context.fail(Error::InvalidArgument);
    }
    return good;
  };
  if (!check(stack.size() >= 8, "it takes 5 inputs and 3 outputs")) return;
  const Tensor &x = stack[0]->toTensor(), &cos = stack[2]->toTensor(), &sin = stack[3]->toTensor();
  const TensorList qkv = stack[1]->toTensorList();
  mobilemoe_attention_inputs_args args = {};
  args.dim = is_rows(x) ? x.size(x.dim() - 1) : 0;
  args.head_dim = cos.dim() == 3 ? 2 * cos.size(2) : 0;
  if (!check(args.dim > 0 && args.head_dim > 0 && x.dim() == 3 && qkv.size() == 6 &&
                 fits(cos, ScalarType::Float, {x.size(0), x.size(1), args.head_dim / 2}) &&
                 fits(sin, ScalarType::Float, {x.size(0), x.size(1), args.head_dim / 2}) &&
                 to_matrix(qkv, 0, args.dim, args.query) && to_matrix(qkv, 2, args.dim, args.key) &&
                 to_matrix(qkv, 4, args.dim, args.value),
             "the types or shapes of its inputs do not belong together")) {
    return;
  }
  const mobilemoe_matrix* matrices[] = {&args.query, &args.key, &args.value};
  void** outs[] = {&args.query_out, &args.key_out, &args.value_out};
  for (int i = 0; i < 3; ++i) {
    Tensor& out = stack[5 + i]->toTensor();
    if (!check(matrices[i]->out_features % args.head_dim == 0, "a projection does not divide into heads")) return;
    const int64_t sizes[] = {x.size(0), x.size(1), matrices[i]->out_features / args.head_dim, args.head_dim};
    executorch::aten::SizesType shape[4];
    for (int j = 0; j < 4; ++j) shape[j] = static_cast<executorch::aten::SizesType>(sizes[j]);
    if (!check(executorch::runtime::resize_tensor(out, {shape, 4}) == Error::Ok, "an output is too small")) return;
    *outs[i] = out.mutable_data_ptr();
  }
  args.num_tokens = x.numel() / args.dim;
  args.eps = static_cast<float>(stack[4]->toDouble());
  args.dtype = MOBILEMOE_FP32;
  args.x = x.const_data_ptr();
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  const EventTracerProfileOpScope scope(context.internal_event_tracer(), "mobilemoe::attention_inputs.out");
  check(mobilemoe_attention_inputs(&args, num_threads()) == MOBILEMOE_OK, mobilemoe_last_error());
}

}  // namespace

EXECUTORCH_LIBRARY(mobilemoe, "moe_ffn.out", moe_ffn_out);
EXECUTORCH_LIBRARY(mobilemoe, "int4_linear.out", int4_linear_out);
EXECUTORCH_LIBRARY(mobilemoe, "int4_embedding.out", int4_embedding_out);
EXECUTORCH_LIBRARY(mobilemoe, "mlp.out", mlp_out);
EXECUTORCH_LIBRARY(mobilemoe, "update_cache.out", update_cache_out);
EXECUTORCH_LIBRARY(mobilemoe, "attention.out", attention_out);
EXECUTORCH_LIBRARY(mobilemoe, "rms_norm.out", rms_norm_out);
static const auto registered = executorch::runtime::register_kernel(
    executorch::runtime::Kernel("mobilemoe::attention_inputs.out", attention_inputs_out));
