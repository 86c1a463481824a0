// A program as the runner sees it: token ids in, logits out, every call of an operator counted.
#pragma once

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace mobilemoe {

using executorch::extension::from_blob;
using executorch::extension::module::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::OpFunction;
using executorch::runtime::Span;

// Text inside a JSON string.
inline std::string escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

[[noreturn]] inline void fail(const std::string& message) {
  std::printf("{\"event\":\"error\",\"message\":\"%s\"}\n", escape(message).c_str());
  std::fflush(stdout);
  std::exit(1);
}

inline void check(Error error, const std::string& what) {
  if (error == Error::Ok) return;
  std::string reason = executorch::runtime::to_string(error);
  if (error == Error::OperatorMissing)
    reason += ": an operator of the program is not in this binary, see the log above";
  fail(what + ": " + reason);
}

template <typename T>
T check(executorch::runtime::Result<T> result, const std::string& what) {
  check(result.error(), what);
  return std::move(result.get());
}

inline int64_t most_probable(const float* logits, int64_t vocab) {
  int64_t best = 0;
  for (int64_t i = 1; i < vocab; ++i) best = logits[i] > logits[best] ? i : best;
  return best;
}

// Every operator that may compute experts or attention gets a function of its own that counts and calls it.
constexpr size_t kMaxCounted = 64;
struct Counted {
  const char* name;
  OpFunction function;
  int64_t calls;
};
inline std::array<Counted, kMaxCounted> counted;

template <size_t I>
void count_and_call(KernelRuntimeContext& context, Span<EValue*> arguments) {
  ++counted[I].calls;
  counted[I].function(context, arguments);
}

template <size_t... I>
std::vector<Kernel> counting_kernels(std::index_sequence<I...>) {
  constexpr OpFunction wrappers[] = {count_and_call<I>...};
  std::vector<Kernel> kernels;
  for (const Kernel& kernel : executorch::runtime::get_registered_kernels()) {
    const std::string name = kernel.name_;
    if (name.rfind("mobilemoe::", 0) != 0 && name.rfind("llama::", 0) != 0) continue;
    if (kernels.size() == kMaxCounted) fail("more operators are registered than can be counted");
    counted[kernels.size()] = {kernel.name_, kernel.op_, 0};
    kernels.emplace_back(kernel.name_, kernel.kernel_key_, wrappers[kernels.size()]);
  }
  return kernels;
}

class Model {
 public:
  // `data` is the file of the experts, or empty.
  Model(const std::string& program, const std::string& data)
      : module_(program, data.empty() ? std::vector<std::string>{} : std::vector<std::string>{data},
                Module::LoadMode::Mmap) {
    check(module_.load(), program);
    context_ = check(module_.get("get_max_seq_len"), "get_max_seq_len").toInt();
    check(module_.load_method("forward", nullptr, nullptr, nullptr,
                              counting_kernels(std::make_index_sequence<kMaxCounted>())),
          "forward");
    const auto meta = check(module_.method_meta("forward"), "forward");
    const auto sizes = check(meta.output_tensor_meta(0), "the output of forward").sizes();
    vocab_ = sizes[sizes.size() - 1];
    num_rows_ = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) num_rows_ *= sizes[i];
  }

  int64_t context() const { return context_; }
  int64_t vocab() const { return vocab_; }
  // Last positions whose logits a call returns, at most.
  int64_t num_rows() const { return num_rows_; }

  // Feeds tokens from a position on. Returns the logits of the last `rows` positions, up to the next call.
  const float* logits(const int64_t* tokens, int length, int64_t position, int rows) {
    const auto input = from_blob(const_cast<int64_t*>(tokens), {1, length}, executorch::aten::ScalarType::Long);
    const auto start = from_blob(&position, {1}, executorch::aten::ScalarType::Long);
    result_ = std::move(check(module_.forward({input, start}), "forward at position " + std::to_string(position))[0]);
    const auto& logits = result_.toTensor();
    if (logits.numel() < rows * vocab_) fail("the program returns the logits of one position: export it again");
    return logits.const_data_ptr<float>() + logits.numel() - rows * vocab_;
  }

  // As `logits`, and returns the most probable next token of each position.
  std::vector<int64_t> forward(const int64_t* tokens, int length, int64_t position, int rows) {
    const float* of = logits(tokens, length, position, rows);
    std::vector<int64_t> chosen;
    for (int row = 0; row < rows; ++row, of += vocab_) chosen.push_back(most_probable(of, vocab_));
    return chosen;
  }

  int64_t forward(const int64_t* tokens, int length, int64_t position) {
    return forward(tokens, length, position, 1)[0];
  }

 private:
  Module module_;
  EValue result_;
  int64_t context_ = 0, vocab_ = 0, num_rows_ = 0;
};

}  // namespace mobilemoe
