// Answers on request, for `mobilemoe chat` on a phone: token ids come in a line, those of the answer go out one by one.
//
//     answer MAX_NEW_TOKENS TEMPERATURE TOP_P SEED LOOKUP NUM_EOS EOS... TOKEN...
//     stop
//
// The tokens are the whole conversation; what the cache holds of them does not run again. `stop` ends an answer early.
// Every answer ends with an event that says how many of its tokens the cache holds.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "lookup.h"
#include "program.h"

namespace mobilemoe {

// Lines of standard input.
class Lines {
 public:
  // The next one; nothing at the end, or where it would have to wait for a line and `wait` is false.
  std::optional<std::string> next(bool wait) {
    while (true) {
      const size_t end = read_.find('\n');
      if (end != std::string::npos) {
        std::string line = read_.substr(0, end);
        read_.erase(0, end + 1);
        return line;
      }
      pollfd input = {STDIN_FILENO, POLLIN, 0};
      if (ended_ || (!wait && poll(&input, 1, 0) <= 0)) return std::nullopt;
      char buffer[4096];
      const ssize_t count = read(STDIN_FILENO, buffer, sizeof(buffer));
      ended_ = count <= 0;
      if (!ended_) read_.append(buffer, count);
    }
  }

  bool ended() const { return ended_; }

 private:
  std::string read_;
  bool ended_ = false;
};

struct Request {
  int64_t max_new_tokens = 0;
  double temperature = 0, top_p = 1;
  uint64_t seed = 0;
  int lookup = 0;
  std::vector<int64_t> eos, tokens;
};

inline Request parse_request(const std::string& line) {
  std::istringstream words(line);
  std::string name;
  Request request;
  size_t num_eos = 0;
  words >> name >> request.max_new_tokens >> request.temperature >> request.top_p >> request.seed >> request.lookup >>
      num_eos;
  for (int64_t token; words >> token;) {
    (request.eos.size() < num_eos ? request.eos : request.tokens).push_back(token);
  }
  if (name != "answer" || !words.eof() || request.tokens.empty()) fail("no request: " + line.substr(0, 200));
  return request;
}

// Greedy at temperature 0, else from the smallest set of tokens whose probabilities sum to `top_p`.
inline int64_t choose(const float* logits, int64_t vocab, const Request& request, std::mt19937_64& random) {
  const int64_t best = most_probable(logits, vocab);
  const float largest = logits[best];
  if (!std::isfinite(largest)) fail("the model's largest logit is not finite: its weights are damaged");
  if (request.temperature == 0) return best;
  std::vector<std::pair<double, int64_t>> ranked;
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    ranked.emplace_back(std::exp((logits[i] - largest) / request.temperature), -i);
    sum += ranked.back().first;
  }
  double kept = sum;
  size_t first = 0;
  if (request.top_p < 1) {
    // The kept tokens move to the end, most probable first; most are never sorted.
    std::make_heap(ranked.begin(), ranked.end());
    first = ranked.size();
    for (kept = 0; first > 0 && kept < request.top_p * sum; --first) {
      std::pop_heap(ranked.begin(), ranked.begin() + first);
      kept += ranked[first - 1].first;
    }
  }
  double drawn = std::uniform_real_distribution<double>(0, kept)(random);
  for (size_t i = ranked.size(); i > first + 1; --i) {
    drawn -= ranked[i - 1].first;
    if (drawn < 0) return -ranked[i - 1].second;
  }
  return -ranked[first].second;
}

class Conversation {
 public:
  explicit Conversation(Model& model) : model_(model) {}

  // Until the input ends.
  void serve() {
    while (const auto line = lines_.next(true)) {
      // It came after the end of the answer that it was for.
      if (*line == "stop") continue;
      answer(parse_request(*line), [this](int64_t token) {
        std::printf("{\"event\":\"token\",\"id\":%lld}\n", static_cast<long long>(token));
        std::fflush(stdout);
        return !lines_.next(false) && !lines_.ended();
      });
      std::printf("{\"event\":\"end\",\"cached\":%zu}\n", cached_.size());
      std::fflush(stdout);
    }
  }

  // As LanguageModel.generate in mobilemoe/generation.py. `emit` takes each token and returns whether to go on.
  template <typename Emit>
  void answer(const Request& request, Emit&& emit) {
    for (const int64_t token : request.tokens) {
      if (token < 0 || token >= model_.vocab()) fail("token " + std::to_string(token) + " is not in the vocabulary");
    }
    if (static_cast<int64_t>(request.tokens.size()) > model_.context()) fail("the tokens do not fit into the context");
    std::mt19937_64 random(request.seed);
    PromptLookup text(request.tokens.data(), static_cast<int>(request.tokens.size()));
    std::vector<int64_t> draft;
    const int64_t longest = request.lookup != 0 ? std::min<int64_t>(kMaxDraftTokens, model_.num_rows() - 1) : 0;
    for (int64_t remaining = request.max_new_tokens; remaining > 0;) {
      const int rows = static_cast<int>(draft.size()) + 1;
      std::vector<int64_t> all = text.tokens();
      all.insert(all.end(), draft.begin(), draft.end());
      const float* logits = run(all, rows);
      for (int row = 0; row < rows; ++row, logits += model_.vocab()) {
        const int64_t token = choose(logits, model_.vocab(), request, random);
        if (std::find(request.eos.begin(), request.eos.end(), token) != request.eos.end()) return forget(text);
        text.append(token);
        --remaining;
        if (!emit(token)) return forget(text);
        if (row == rows - 1 || token != draft[row]) break;
      }
      // The token after the last position goes out, but the cache has no room to run it.
      const int64_t room = model_.context() - static_cast<int64_t>(text.tokens().size());
      if (room < 0) break;
      draft = text.draft(times_, static_cast<int>(std::max<int64_t>(0, std::min({longest, remaining - 1, room}))));
    }
    forget(text);
  }

 private:
  // What the cache does not hold of the tokens, for the logits of the last `rows` of them at least.
  const float* run(const std::vector<int64_t>& tokens, int rows) {
    size_t start = 0;
    while (start < cached_.size() && start + rows < tokens.size() && tokens[start] == cached_[start]) ++start;
    const int length = static_cast<int>(tokens.size() - start);
    const auto started = std::chrono::steady_clock::now();
    const float* logits = model_.logits(tokens.data() + start, length, static_cast<int64_t>(start), rows);
    // The time of a prompt says nothing about that of a token.
    if (length == rows) {
      times_.record(rows - 1, std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    }
    cached_ = tokens;
    return logits;
  }

  // The end of a draft that was not chosen.
  void forget(const PromptLookup& text) {
    size_t same = 0;
    const size_t most = std::min(cached_.size(), text.tokens().size());
    while (same < most && cached_[same] == text.tokens()[same]) ++same;
    cached_.resize(same);
  }

  Model& model_;
  Lines lines_;
  VerificationTimes times_;
  std::vector<int64_t> cached_;
};

}  // namespace mobilemoe
