// Prompt lookup as in mobilemoe/lookup.py, which explains it: drafts from earlier text, of lengths that pay.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace mobilemoe {

constexpr int kMaxDraftTokens = 7;  // with the token before them, what a layer computes in one region

// Running means of the time of a call that verifies a draft, over that of one token.
class VerificationTimes {
 public:
  VerificationTimes() {
    for (int length = 0; length <= kMaxDraftTokens; ++length) ratios_[length] = assumed(length);
  }

  void record(int draft_tokens, double seconds) {
    if (step_ == 0) step_ = seconds / ratios_[draft_tokens];
    if (draft_tokens > 0) {
      ratios_[draft_tokens] = running_mean(ratios_[draft_tokens], seconds / step_);
      return;
    }
    step_ = running_mean(step_, seconds);
    for (int length = 0; length <= kMaxDraftTokens; ++length) {
      ratios_[length] += kForgotten * (assumed(length) - ratios_[length]);
    }
  }

  int best_length(double acceptance, int longest) const {
    int best = 0;
    double best_rate = kLeastGain, tokens = 1, time = 1, accepted = 1;
    for (int length = 1; length <= std::min(longest, kMaxDraftTokens); ++length) {
      accepted *= acceptance;
      tokens += accepted;
      time = std::max(time + kTimePerDraftToken, ratios_[length]);
      if (tokens / time <= best_rate) continue;
      best = length;
      best_rate = tokens / time;
    }
    return best;
  }

 private:
  static constexpr double kTimeWeight = 0.5, kTimePerDraftToken = 0.2, kForgotten = 1.0 / 2048, kLeastGain = 1.05;

  static double assumed(int length) { return 1 + kTimePerDraftToken * length; }
  static double running_mean(double mean, double value) {
    return mean + kTimeWeight * (std::min(value, 2 * mean) - mean);
  }

  double step_ = 0;
  double ratios_[kMaxDraftTokens + 1];
};

// The text so far, and its predictions of the next tokens.
class PromptLookup {
 public:
  PromptLookup(const int64_t* prompt, int length) {
    for (int i = 0; i < length; ++i) add(prompt[i]);
  }

  const std::vector<int64_t>& tokens() const { return tokens_; }

  // A token that the model chose.
  void append(int64_t token) {
    if (source_ > 0) acceptance_ += kAcceptanceWeight * ((tokens_[source_] == token) - acceptance_);
    add(token);
  }

  std::vector<int64_t> draft(const VerificationTimes& times, int longest) const {
    std::vector<int64_t> draft;
    const int length = source_ > 0 ? times.best_length(acceptance_, longest) : 0;
    for (size_t at = source_; at < source_ + length; ++at) {
      draft.push_back(at < tokens_.size() ? tokens_[at] : draft[at - tokens_.size()]);
    }
    return draft;
  }

 private:
  static constexpr double kAcceptanceWeight = 1.0 / 8;
  static constexpr size_t kLongestRun = 3, kShortestRun = 2;

  void add(int64_t token) {
    const bool follows = source_ > 0 && tokens_[source_] == token;
    tokens_.push_back(token);
    source_ = follows ? source_ + 1 : 0;
    for (size_t length = kLongestRun; length >= kShortestRun; --length) {
      if (length > tokens_.size()) continue;
      size_t& after = after_[{tokens_.end() - length, tokens_.end()}];
      if (source_ == 0) source_ = after;
      after = tokens_.size();
    }
  }

  std::vector<int64_t> tokens_;
  std::map<std::vector<int64_t>, size_t> after_;  // by run of tokens: the position after its last occurrence
  size_t source_ = 0;                             // of the predicted next token, or 0
  double acceptance_ = 0.5;
};

}  // namespace mobilemoe
