// Measures a program without Python and without a tokenizer: token ids in, times out as JSON lines (../README.md).
//
// Operators are counted where the program calls them, so what a report names is what ran.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/runtime.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lookup.h"
#include "mobilemoe.h"

// Of ExecuTorch's threadpool.h, which its wheel does not ship.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::extension::from_blob;
using executorch::extension::module::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::OpFunction;
using executorch::runtime::Span;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Text inside a JSON string.
std::string escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

[[noreturn]] void fail(const std::string& message) {
  std::printf("{\"event\":\"error\",\"message\":\"%s\"}\n", escape(message).c_str());
  std::fflush(stdout);
  std::exit(1);
}

void check(Error error, const std::string& what) {
  if (error == Error::Ok) return;
  std::string reason = executorch::runtime::to_string(error);
  if (error == Error::OperatorMissing)
    reason += ": an operator of the program is not in this binary, see the log above";
  fail(what + ": " + reason);
}

struct Options {
  std::string model, data, tokens;
  std::vector<int> prompt_lengths;
  int new_tokens = 48, repeats = 5, first_repeat = 0, threads = 0, generate = 0;
  double sustained = 0;
  bool cold = false;
};

int64_t whole_number(const std::string& name, const std::string& text, int64_t least) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > (int64_t{1} << 31)) {
    fail(name + " " + text + " is no whole number from " + std::to_string(least) + " on");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--cold") {
      options.cold = true;
      continue;
    }
    if (i + 1 == argc) fail(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--model") {
      options.model = value;
    } else if (name == "--data") {
      options.data = value;
    } else if (name == "--tokens") {
      options.tokens = value;
    } else if (name == "--prompt-lengths") {
      std::stringstream list(value);
      for (std::string item; std::getline(list, item, ',');) {
        options.prompt_lengths.push_back(static_cast<int>(whole_number(name, item, 1)));
      }
    } else if (name == "--new-tokens") {
      options.new_tokens = static_cast<int>(whole_number(name, value, 1));
    } else if (name == "--repeats") {
      options.repeats = static_cast<int>(whole_number(name, value, 1));
    } else if (name == "--first-repeat") {
      options.first_repeat = static_cast<int>(whole_number(name, value, 0));
    } else if (name == "--threads") {
      options.threads = static_cast<int>(whole_number(name, value, 1));
    } else if (name == "--generate") {
      options.generate = static_cast<int>(whole_number(name, value, 1));
    } else if (name == "--sustained") {
      options.sustained = static_cast<double>(whole_number(name, value, 0));
    } else {
      fail(name +
           " is no option. Known: --model --data --tokens --prompt-lengths --new-tokens --repeats --threads "
           "--first-repeat --generate --sustained --cold");
    }
  }
  if (options.model.empty() || options.tokens.empty() || options.prompt_lengths.empty()) {
    fail("--model, --tokens and --prompt-lengths are needed");
  }
  return options;
}

std::vector<int64_t> read_tokens(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail("cannot read " + path);
  std::vector<int64_t> tokens;
  for (int64_t token; file >> token;) tokens.push_back(token);
  if (!file.eof()) fail(path + " holds something that is no token id");
  return tokens;
}

// The kilobytes that a line of a file in /proc names, as bytes; -1 where there is no such file.
int64_t proc_bytes(const char* path, const char* key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) == 0) return 1024 * std::atoll(line.c_str() + std::strlen(key));
  }
  return -1;
}

// Drops a file from the page cache, which needs no rights beyond reading it.
void evict(const std::string& path) {
#ifdef POSIX_FADV_DONTNEED
  const int file = open(path.c_str(), O_RDONLY);
  if (file < 0) fail("cannot read " + path);
  fsync(file);
  posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  close(file);
#endif
}

// Every operator that may compute experts or attention gets a function of its own that counts and calls it.
constexpr size_t kMaxCounted = 64;
struct Counted {
  const char* name;
  OpFunction function;
  int64_t calls;
};
std::array<Counted, kMaxCounted> counted;

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
  explicit Model(const Options& options)
      : module_(options.model,
                options.data.empty() ? std::vector<std::string>{} : std::vector<std::string>{options.data},
                Module::LoadMode::Mmap) {
    check(module_.load(), options.model);
    const auto context = module_.get("get_max_seq_len");
    check(context.error(), "get_max_seq_len");
    context_ = context->toInt();
    check(module_.load_method("forward", nullptr, nullptr, nullptr,
                              counting_kernels(std::make_index_sequence<kMaxCounted>())),
          "forward");
  }

  int64_t context() const { return context_; }

  // Feeds tokens from a position on and returns the most probable next one of the last `num_rows`.
  std::vector<int64_t> forward(const int64_t* tokens, int length, int64_t position, int num_rows) {
    const auto input = from_blob(const_cast<int64_t*>(tokens), {1, length}, executorch::aten::ScalarType::Long);
    const auto start = from_blob(&position, {1}, executorch::aten::ScalarType::Long);
    const auto result = module_.forward({input, start});
    check(result.error(), "forward at position " + std::to_string(position));
    const auto& logits = result->at(0).toTensor();
    const int64_t vocab = logits.size(logits.dim() - 1);
    if (logits.numel() < num_rows * vocab)
      fail("--generate needs logits of several positions: export the program again");
    std::vector<int64_t> chosen;
    for (int row = num_rows; row > 0; --row) {
      const float* of = logits.const_data_ptr<float>() + logits.numel() - row * vocab;
      int64_t best = 0;
      for (int64_t i = 1; i < vocab; ++i) best = of[i] > of[best] ? i : best;
      chosen.push_back(best);
    }
    return chosen;
  }

  int64_t forward(const int64_t* tokens, int length, int64_t position) {
    return forward(tokens, length, position, 1)[0];
  }

 private:
  Module module_;
  int64_t context_ = 0;
};

struct Measurement {
  double first_token = 0;
  std::vector<double> decode;
  std::vector<int64_t> predicted;
};

// The tokens are given, not drawn: what a model of random weights draws would visit few experts.
Measurement measure(Model& model, const int64_t* tokens, int prompt_length, int new_tokens) {
  Measurement result;
  auto start = Clock::now();
  result.predicted.push_back(model.forward(tokens, prompt_length, 0));
  result.first_token = seconds_since(start);
  for (int position = prompt_length; position < prompt_length + new_tokens; ++position) {
    start = Clock::now();
    result.predicted.push_back(model.forward(tokens + position, 1, position));
    result.decode.push_back(seconds_since(start));
  }
  return result;
}

struct Generation {
  double seconds = 0;  // of the tokens after the first
  int calls = 0;
  std::vector<int64_t> tokens;
};

// Greedy, also past the end of the text: a benchmark wants as many tokens as it asked for.
Generation generate(Model& model, const int64_t* prompt, int length, int new_tokens,
                    mobilemoe::VerificationTimes* times) {
  mobilemoe::PromptLookup text(prompt, length);
  text.append(model.forward(prompt, length, 0));
  Generation result;
  const auto start = Clock::now();
  for (int remaining = new_tokens - 1; remaining > 0; ++result.calls) {
    const int64_t position = text.tokens().size() - 1;
    std::vector<int64_t> fed = {text.tokens().back()};
    if (times != nullptr) {
      const std::vector<int64_t> draft = text.draft(*times, remaining - 1);
      fed.insert(fed.end(), draft.begin(), draft.end());
    }
    const auto call = Clock::now();
    const auto chosen =
        model.forward(fed.data(), static_cast<int>(fed.size()), position, static_cast<int>(fed.size()));
    if (times != nullptr) times->record(static_cast<int>(fed.size()) - 1, seconds_since(call));
    for (size_t i = 0; i < chosen.size(); ++i) {
      text.append(chosen[i]);
      --remaining;
      if (i + 1 < fed.size() && fed[i + 1] != chosen[i]) break;
    }
  }
  result.seconds = seconds_since(start);
  result.tokens.assign(text.tokens().begin() + length, text.tokens().end());
  return result;
}

template <typename T>
std::string json_list(const std::vector<T>& values, const char* format) {
  std::string out;
  char number[32];
  for (const T value : values) {
    std::snprintf(number, sizeof(number), format, value);
    out += (out.empty() ? "" : ",") + std::string(number);
  }
  return "[" + out + "]";
}

}  // namespace

int main(int argc, char** argv) {
  executorch::runtime::runtime_init();
  const Options options = parse(argc, argv);
  const std::vector<int64_t> tokens = read_tokens(options.tokens);
  int longest = 0;
  for (const int length : options.prompt_lengths) longest = length > longest ? length : longest;
  const size_t given = longest + options.new_tokens;
  const size_t needed = longest + std::max(options.new_tokens, options.generate);
  if (tokens.size() < given) {
    fail(options.tokens + " has " + std::to_string(tokens.size()) + " tokens and " + std::to_string(given) +
         " are needed");
  }
  if (options.cold) {
    evict(options.model);
    if (!options.data.empty()) evict(options.data);
  }
  if (options.threads > 0) {
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(options.threads);
  }
  const auto started = Clock::now();
  Model model(options);
  const double load = seconds_since(started);
  if (static_cast<int64_t>(needed) > model.context()) {
    fail("the program has a context of " + std::to_string(model.context()) + " tokens and " + std::to_string(needed) +
         " are needed");
  }
  std::printf(
      "{\"event\":\"loaded\",\"load_s\":%.6f,\"context\":%lld,\"threads\":%lld,\"isa\":\"%s\","
      "\"rss_bytes\":%lld,\"pss_bytes\":%lld}\n",
      load, static_cast<long long>(model.context()), static_cast<long long>(executorch::extension::get_thread_count()),
      mobilemoe_isa(), static_cast<long long>(proc_bytes("/proc/self/status", "VmRSS:")),
      static_cast<long long>(proc_bytes("/proc/self/smaps_rollup", "Pss:")));
  std::fflush(stdout);
  // Repeat -1 is the first pass after loading, which reads the weights: a warm-up, reported as such.
  for (int repeat = -1; repeat < options.repeats; ++repeat) {
    for (const int length : options.prompt_lengths) {
      const size_t offset =
          (repeat + 1 + options.first_repeat) * 97 % (tokens.size() - length - options.new_tokens + 1);
      const Measurement result = measure(model, tokens.data() + offset, length, options.new_tokens);
      std::printf(
          "{\"event\":\"measure\",\"repeat\":%d,\"prompt_length\":%d,\"offset\":%zu,\"first_token_s\":%.6f,"
          "\"decode_s\":%s,\"tokens\":%s,\"peak_rss_bytes\":%lld,\"elapsed_s\":%.3f}\n",
          repeat, length, offset, result.first_token, json_list(result.decode, "%.6f").c_str(),
          json_list(std::vector<long long>(result.predicted.begin(), result.predicted.end()), "%lld").c_str(),
          static_cast<long long>(proc_bytes("/proc/self/status", "VmHWM:")), seconds_since(started));
      std::fflush(stdout);
    }
  }
  mobilemoe::VerificationTimes times;
  for (int repeat = 0; options.generate > 0 && repeat < options.repeats; ++repeat) {
    for (const int length : options.prompt_lengths) {
      for (const bool lookup : {false, true}) {
        const Generation made = generate(model, tokens.data(), length, options.generate, lookup ? &times : nullptr);
        std::printf(
            "{\"event\":\"generate\",\"repeat\":%d,\"prompt_length\":%d,\"prompt_lookup\":%s,\"calls\":%d,"
            "\"seconds\":%.6f,\"tokens\":%s}\n",
            repeat, length, lookup ? "true" : "false", made.calls, made.seconds,
            json_list(std::vector<long long>(made.tokens.begin(), made.tokens.end()), "%lld").c_str());
        std::fflush(stdout);
      }
    }
  }
  const auto sustained = Clock::now();
  while (seconds_since(sustained) < options.sustained) {
    const Measurement result = measure(model, tokens.data(), options.prompt_lengths[0], options.new_tokens);
    double decode = 0;
    for (const double seconds : result.decode) decode += seconds;
    std::printf(
        "{\"event\":\"sustained\",\"elapsed_s\":%.3f,\"prefill_tokens_per_s\":%.4g,\"decode_tokens_per_s\":%.4g}\n",
        seconds_since(sustained), options.prompt_lengths[0] / result.first_token, options.new_tokens / decode);
    std::fflush(stdout);
  }
  std::string operators;
  for (const Counted& one : counted) {
    if (one.name == nullptr || one.calls == 0) continue;
    operators += (operators.empty() ? "\"" : ",\"") + std::string(one.name) + "\":" + std::to_string(one.calls);
  }
  std::printf("{\"event\":\"done\",\"operators\":{%s},\"peak_rss_bytes\":%lld,\"pss_bytes\":%lld}\n",
              operators.c_str(), static_cast<long long>(proc_bytes("/proc/self/status", "VmHWM:")),
              static_cast<long long>(proc_bytes("/proc/self/smaps_rollup", "Pss:")));
  return 0;
}
