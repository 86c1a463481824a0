// Runs a program without Python and without a tokenizer: token ids in, times or tokens out as JSON lines (../README.md).
//
// Operators are counted where the program calls them, so what a report names is what ran.
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/runtime.h>
#include <fcntl.h>
#ifdef __linux__
#include <sched.h>
#endif
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "chat.h"
#include "conversation.h"
#include "lookup.h"
#include "mobilemoe.h"
#include "program.h"

// Of ExecuTorch's threadpool.h, which its wheel does not ship.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using mobilemoe::counted;
using mobilemoe::Counted;
using mobilemoe::fail;
using mobilemoe::Model;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Options {
  std::string model, data, tokens, tokenizer;
  std::vector<int> prompt_lengths, cores;
  int new_tokens = 48, repeats = 5, first_repeat = 0, threads = 0, generate = 0;
  double sustained = 0;
  bool cold = false, serve = false, chat = false;
};

int64_t whole_number(const std::string& name, const std::string& text, int64_t least) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > (int64_t{1} << 31)) {
    fail(name + " " + text + " is no whole number from " + std::to_string(least) + " on");
  }
  return value;
}

std::vector<int> whole_numbers(const std::string& name, const std::string& text, int64_t least) {
  std::vector<int> numbers;
  std::stringstream list(text);
  for (std::string item; std::getline(list, item, ',');) {
    numbers.push_back(static_cast<int>(whole_number(name, item, least)));
  }
  return numbers;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--cold") {
      options.cold = true;
      continue;
    }
    if (name == "--chat") {
      options.chat = true;
      continue;
    }
    if (name == "--serve") {
      options.serve = true;
      continue;
    }
    if (i + 1 == argc) fail(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--model") {
      options.model = value;
    } else if (name == "--data") {
      options.data = value;
    } else if (name == "--tokenizer") {
      options.tokenizer = value;
    } else if (name == "--tokens") {
      options.tokens = value;
    } else if (name == "--prompt-lengths") {
      options.prompt_lengths = whole_numbers(name, value, 1);
    } else if (name == "--cores") {
      options.cores = whole_numbers(name, value, 0);
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
           "--cores --first-repeat --generate --sustained --cold --serve --tokenizer --chat");
    }
  }
  if (options.chat && options.tokenizer.empty()) fail("--chat needs --tokenizer");
  if ((options.serve || options.chat) && !options.model.empty()) return options;
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

// Threads inherit this, so it comes before them.
void keep_to(const std::vector<int>& cores) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) {
    if (core < CPU_SETSIZE) CPU_SET(core, &set);
  }
  if (sched_setaffinity(0, sizeof(set), &set) == 0) return;
#endif
  fail("--cores: this system does not give the runner these cores");
}

// Where the first thread and those that have computed are now, or were last. Empty where /proc has no threads.
void find_cores(std::set<int>& cores) {
  std::error_code error;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", error)) {
    std::ifstream file(task.path() / "stat");
    std::string text;
    std::getline(file, text);
    // After the name, which may hold spaces: user and system time are fields 14 and 15, the processor is field 39.
    std::istringstream fields(text.substr(std::min(text.size(), text.rfind(')') + 2)));
    std::vector<std::string> values;
    for (std::string value; fields >> value;) values.push_back(value);
    if (values.size() <= 36) continue;
    const bool computed = values[11] != "0" || values[12] != "0" || task.path().filename() == std::to_string(getpid());
    if (computed) cores.insert(std::atoi(values[36].c_str()));
  }
}

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
  std::vector<int64_t> tokens;
  size_t needed = 0;
  if (!options.serve && !options.chat) {
    tokens = read_tokens(options.tokens);
    const size_t longest = *std::max_element(options.prompt_lengths.begin(), options.prompt_lengths.end());
    const size_t given = longest + options.new_tokens;
    needed = longest + std::max(options.new_tokens, options.generate);
    if (tokens.size() < given) {
      fail(options.tokens + " has " + std::to_string(tokens.size()) + " tokens and " + std::to_string(given) +
           " are needed");
    }
  }
  if (options.cold) {
    evict(options.model);
    if (!options.data.empty()) evict(options.data);
  }
  if (!options.cores.empty()) keep_to(options.cores);
  if (options.threads > 0) {
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(options.threads);
  }
  const auto started = Clock::now();
  Model model(options.model, options.data);
  const double load = seconds_since(started);
  if (static_cast<int64_t>(needed) > model.context()) {
    fail("the program has a context of " + std::to_string(model.context()) + " tokens and " + std::to_string(needed) +
         " are needed");
  }
  if (options.chat) {
    try {
      const mobilemoe::Tokenizer tokenizer(options.tokenizer);
      mobilemoe::TextChat(model, tokenizer, options.new_tokens).run();
    } catch (const std::runtime_error& error) {
      fail(options.tokenizer + ": " + error.what());
    }
    return 0;
  }
  std::printf(
      "{\"event\":\"loaded\",\"load_s\":%.6f,\"context\":%lld,\"threads\":%lld,\"isa\":\"%s\","
      "\"num_rows\":%lld,\"rss_bytes\":%lld,\"pss_bytes\":%lld}\n",
      load, static_cast<long long>(model.context()), static_cast<long long>(executorch::extension::get_thread_count()),
      mobilemoe_isa(), static_cast<long long>(model.num_rows()),
      static_cast<long long>(proc_bytes("/proc/self/status", "VmRSS:")),
      static_cast<long long>(proc_bytes("/proc/self/smaps_rollup", "Pss:")));
  std::fflush(stdout);
  if (options.serve) {
    mobilemoe::Conversation(model).serve();
    return 0;
  }
  std::set<int> cores;
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
      find_cores(cores);
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
  std::printf("{\"event\":\"done\",\"operators\":{%s},\"cores\":%s,\"peak_rss_bytes\":%lld,\"pss_bytes\":%lld}\n",
              operators.c_str(), json_list(std::vector<int>(cores.begin(), cores.end()), "%d").c_str(),
              static_cast<long long>(proc_bytes("/proc/self/status", "VmHWM:")),
              static_cast<long long>(proc_bytes("/proc/self/smaps_rollup", "Pss:")));
  return 0;
}
