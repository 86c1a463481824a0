// A conversation in text, without Python: lines of standard input are messages, in the released chat format.
#pragma once

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "conversation.h"
#include "tokenizer.h"

namespace mobilemoe {

// The first bytes that are whole characters; the others stay.
inline std::string whole_characters(std::string& bytes) {
  size_t whole = bytes.size();
  for (size_t back = 1; back <= 3 && back <= bytes.size(); ++back) {
    const size_t length = utf8_length(bytes[bytes.size() - back]);
    if (length == 0) continue;
    if (length > back) whole = bytes.size() - back;
    break;
  }
  const std::string out = bytes.substr(0, whole);
  bytes.erase(0, whole);
  return out;
}

class TextChat {
 public:
  TextChat(Model& model, const Tokenizer& tokenizer, int max_new_tokens)
      : model_(model), tokenizer_(tokenizer), conversation_(model) {
    request_.max_new_tokens = max_new_tokens;
    request_.lookup = 1;
    request_.eos = {tokenizer.added("<|eot|>"), tokenizer.added("<|end_of_text|>")};
    request_.tokens = {tokenizer.added("<|begin_of_text|>")};
  }

  // Until the input ends.
  void run() {
    for (std::string line; std::getline(std::cin, line);) {
      const std::vector<int64_t> turn =
          tokenizer_.encode("<|header_start|>user<|header_end|>\n\n" + line +
                            "<|eot|><|header_start|>assistant<|header_end|>\n\n");
      if (request_.tokens.size() + turn.size() > static_cast<size_t>(model_.context())) request_.tokens.resize(1);
      request_.tokens.insert(request_.tokens.end(), turn.begin(), turn.end());
      answer();
      request_.tokens.push_back(request_.eos[0]);
    }
  }

 private:
  void answer() {
    std::string bytes;
    std::vector<int64_t> chosen;
    conversation_.answer(request_, [&](int64_t token) {
      chosen.push_back(token);
      bytes += tokenizer_.bytes(token);
      std::fputs(whole_characters(bytes).c_str(), stdout);
      std::fflush(stdout);
      return true;
    });
    std::printf("%s\n", bytes.c_str());
    std::fflush(stdout);
    request_.tokens.insert(request_.tokens.end(), chosen.begin(), chosen.end());
  }

  Model& model_;
  const Tokenizer& tokenizer_;
  Conversation conversation_;
  Request request_;
};

}  // namespace mobilemoe
