// The tokenizer of a tokenizer.json of the released shape: byte-level BPE after the Llama-3 split. Text to token ids and back,
// as the `tokenizers` library does it. Other kinds are refused.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <limits>
#include <queue>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "json.h"
#include "unicode_ranges.h"

namespace mobilemoe {

constexpr const char* kLlama3Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct Character {
  uint32_t code = 0;
  size_t begin = 0, end = 0;  // bytes
};

template <size_t N>
bool in_ranges(const std::array<CodeRange, N>& ranges, uint32_t code) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), code,
                                      [](uint32_t value, const CodeRange& range) { return value < range.first; });
  return after != ranges.begin() && code <= (after - 1)->last;
}

inline bool is_letter(uint32_t code) { return in_ranges(kLetters, code); }
inline bool is_number(uint32_t code) { return in_ranges(kNumbers, code); }
inline bool is_space(uint32_t code) { return in_ranges(kSpaces, code); }
inline bool is_line_end(uint32_t code) { return code == '\r' || code == '\n'; }

// Bytes of the character that a byte begins; 0 for a byte inside of one.
inline size_t utf8_length(unsigned char first) {
  return first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
}

// Throws std::runtime_error for text that is not UTF-8.
inline std::vector<Character> characters(std::string_view text) {
  std::vector<Character> found;
  for (size_t at = 0; at < text.size();) {
    const unsigned char first = text[at];
    const size_t length = utf8_length(first);
    if (length == 0 || at + length > text.size()) throw std::runtime_error("the text is not UTF-8");
    uint32_t code = length == 1 ? first : first & (0x7F >> length);
    for (size_t i = 1; i < length; ++i) {
      if ((text[at + i] & 0xC0) != 0x80) throw std::runtime_error("the text is not UTF-8");
      code = code << 6 | (text[at + i] & 0x3F);
    }
    found.push_back({code, at, at + length});
    at += length;
  }
  return found;
}

// The number of characters of the next piece of the split: its alternatives in their order, written out.
inline size_t next_piece(const std::vector<Character>& text, size_t start) {
  const size_t end = text.size();
  const auto code = [&](size_t i) { return i < end ? text[i].code : 0; };
  const auto run = [&](size_t i, auto&& is) {
    while (i < end && is(text[i].code)) ++i;
    return i;
  };
  const auto other = [](uint32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); };
  const uint32_t first = code(start);
  if (first == '\'') {
    // A long s is an s where case does not count.
    const auto lower = [&](size_t i) { return code(i) == 0x17F ? 's' : code(i) < 0x80 ? code(i) | 32 : 0; };
    const uint32_t second = lower(start + 1), third = lower(start + 2);
    if (second == 's' || second == 't' || second == 'm' || second == 'd') return 2;
    if ((second == 'r' || second == 'v') && third == 'e') return 3;
    if (second == 'l' && third == 'l') return 3;
  }
  const size_t letters = is_letter(first) || is_number(first) || is_line_end(first) ? start : start + 1;
  if (letters < end && is_letter(code(letters))) return run(letters, is_letter) - start;
  if (is_number(first)) return std::min<size_t>(run(start, is_number) - start, 3);
  const size_t marks = first == ' ' ? start + 1 : start;
  if (marks < end && other(code(marks))) return run(run(marks, other), is_line_end) - start;
  const size_t spaces = run(start, is_space);
  for (size_t i = spaces; i > start; --i) {
    if (is_line_end(code(i - 1))) return i - start;
  }
  // The last space goes with the word after it.
  return spaces < end && spaces - start > 1 ? spaces - start - 1 : spaces - start;
}

class Tokenizer {
 public:
  // Throws std::runtime_error for a file that is damaged or of another kind of tokenizer.
  explicit Tokenizer(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream content;
    content << file.rdbuf();
    if (!file || content.str().empty()) throw std::runtime_error("cannot be read");
    const std::string text = content.str();
    const Json json = JsonReader(text).read();
    check_kind(json);
    const Json& model = json["model"];
    ignore_merges_ = model["ignore_merges"].is_true();
    const std::unordered_map<uint32_t, char> bytes = byte_characters();
    for (const auto& [token, id] : model["vocab"].object) {
      set_token(to_bytes(token, bytes), whole_number(id), false);
    }
    for (int byte = 0; byte < 256; ++byte) {
      const auto found = ids_.find(std::string(1, static_cast<char>(byte)));
      if (found == ids_.end()) throw std::runtime_error("has no token for byte " + std::to_string(byte));
      byte_ids_[byte] = found->second;
    }
    read_merges(model["merges"], bytes);
    for (const Json& token : json["added_tokens"].list) {
      const std::string& name = token["content"].string;
      for (const char* flag : {"lstrip", "rstrip", "single_word", "normalized"}) {
        if (token[flag].is_true()) throw std::runtime_error("token " + name + " is matched in a way that is not known here");
      }
      if (name.empty()) throw std::runtime_error("an added token is empty");
      added_.emplace_back(name, whole_number(token["id"]));
      set_token(name, added_.back().second, token["special"].is_true());
    }
    // The longest one at a place.
    std::stable_sort(added_.begin(), added_.end(),
                     [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  }

  // Throws std::runtime_error for text that is not UTF-8.
  std::vector<int64_t> encode(const std::string& text) const {
    std::vector<int64_t> tokens;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
      const auto* token = added_at(text, at);
      if (token == nullptr) {
        ++at;
        continue;
      }
      encode_text(std::string_view(text).substr(begin, at - begin), tokens);
      tokens.push_back(token->second);
      begin = at += token->first.size();
    }
    encode_text(std::string_view(text).substr(begin), tokens);
    return tokens;
  }

  // The bytes of a token, which may be a part of a character. Special tokens have none.
  const std::string& bytes(int64_t id) const {
    static const std::string none;
    return id >= 0 && id < static_cast<int64_t>(tokens_.size()) && !special_[id] ? tokens_[id] : none;
  }

  // The id of an added token. Throws std::runtime_error without one of this name.
  int64_t added(const std::string& name) const {
    for (const auto& [token, id] : added_) {
      if (token == name) return id;
    }
    throw std::runtime_error("has no token " + name);
  }

 private:
  static void check_kind(const Json& json) {
    const Json& model = json["model"];
    const auto& steps = json["pre_tokenizer"]["pretokenizers"].list;
    const bool split = steps.size() == 2 && steps[0]["type"].is("Split") && steps[0]["pattern"]["Regex"].is(kLlama3Split) &&
                       steps[0]["behavior"].is("Isolated") && !steps[0]["invert"].is_true();
    const bool bytes = steps.size() == 2 && steps[1]["type"].is("ByteLevel") && !steps[1]["add_prefix_space"].is_true() &&
                       !steps[1]["use_regex"].is_true();
    const bool plain = json["normalizer"].is_null() && model["dropout"].is_null() && !model["byte_fallback"].is_true();
    if (!model["type"].is("BPE") || !split || !bytes || !plain) {
      throw std::runtime_error("is no byte-level BPE with the Llama-3 split");
    }
  }

  static int64_t whole_number(const Json& json) {
    // Ids index a table.
    if (json.kind != Json::Kind::kNumber || json.number < 0 || json.number >= 1 << 24) {
      throw std::runtime_error("has an id that is no number");
    }
    return static_cast<int64_t>(json.number);
  }

  // How tokenizer.json writes bytes: printable ones as themselves, the others from U+0100 on.
  static std::unordered_map<uint32_t, char> byte_characters() {
    std::unordered_map<uint32_t, char> bytes;
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
      bytes[printable ? byte : next++] = static_cast<char>(byte);
    }
    return bytes;
  }

  static std::string to_bytes(std::string_view token, const std::unordered_map<uint32_t, char>& bytes) {
    std::string out;
    for (const Character& character : characters(token)) {
      const auto found = bytes.find(character.code);
      if (found == bytes.end()) throw std::runtime_error("has a token that is not made of bytes");
      out += found->second;
    }
    return out;
  }

  void set_token(const std::string& token, int64_t id, bool special) {
    if (id >= static_cast<int64_t>(tokens_.size())) {
      tokens_.resize(id + 1);
      special_.resize(id + 1);
    }
    tokens_[id] = token;
    special_[id] = special;
    ids_.emplace(token, id);
  }

  static uint64_t pair(int64_t left, int64_t right) { return static_cast<uint64_t>(left) << 32 | right; }

  void read_merges(const Json& merges, const std::unordered_map<uint32_t, char>& bytes) {
    int64_t rank = 0;
    for (const Json& merge : merges.list) {
      // A pair, or in older files both in one string.
      const size_t space = merge.string.find(' ');
      const bool two = merge.list.size() == 2;
      if (!two && space == std::string::npos) throw std::runtime_error("has a merge that is no pair");
      const std::string left = to_bytes(two ? merge.list[0].string : merge.string.substr(0, space), bytes);
      const std::string right = to_bytes(two ? merge.list[1].string : merge.string.substr(space + 1), bytes);
      const auto a = ids_.find(left), b = ids_.find(right), both = ids_.find(left + right);
      if (a == ids_.end() || b == ids_.end() || both == ids_.end()) {
        throw std::runtime_error("has a merge whose tokens are not in its vocabulary");
      }
      merges_.emplace(pair(a->second, b->second), std::make_pair(rank++, both->second));
    }
  }

  const std::pair<std::string, int64_t>* added_at(const std::string& text, size_t at) const {
    for (const auto& token : added_) {
      if (text.compare(at, token.first.size(), token.first) == 0) return &token;
    }
    return nullptr;
  }

  void encode_text(std::string_view text, std::vector<int64_t>& tokens) const {
    const std::vector<Character> all = characters(text);
    for (size_t at = 0; at < all.size();) {
      const size_t count = next_piece(all, at);
      const size_t begin = all[at].begin;
      encode_piece(text.substr(begin, all[at + count - 1].end - begin), tokens);
      at += count;
    }
  }

  // Merges the pair of lowest rank, the first one of several, until none is left.
  void encode_piece(std::string_view piece, std::vector<int64_t>& tokens) const {
    if (ignore_merges_) {
      if (const auto whole = ids_.find(std::string(piece)); whole != ids_.end()) {
        tokens.push_back(whole->second);
        return;
      }
    }
    constexpr size_t kNone = std::numeric_limits<size_t>::max();
    struct Symbol {
      int64_t id;
      size_t before, after;
    };
    std::vector<Symbol> symbols;
    for (size_t i = 0; i < piece.size(); ++i) {
      symbols.push_back({byte_ids_[static_cast<unsigned char>(piece[i])], i == 0 ? kNone : i - 1,
                         i + 1 < piece.size() ? i + 1 : kNone});
    }
    struct Merge {
      int64_t rank;
      size_t at;
      int64_t left, right, id;
      bool operator<(const Merge& other) const {
        return rank != other.rank ? rank > other.rank : at > other.at;
      }
    };
    std::priority_queue<Merge> queue;
    const auto consider = [&](size_t at) {
      if (at == kNone || symbols[at].after == kNone) return;
      const int64_t left = symbols[at].id, right = symbols[symbols[at].after].id;
      const auto found = merges_.find(pair(left, right));
      if (found != merges_.end()) queue.push({found->second.first, at, left, right, found->second.second});
    };
    for (size_t i = 0; i < symbols.size(); ++i) consider(i);
    while (!queue.empty()) {
      const Merge merge = queue.top();
      queue.pop();
      Symbol& symbol = symbols[merge.at];
      // One of the two is another symbol by now.
      if (symbol.id != merge.left || symbol.after == kNone || symbols[symbol.after].id != merge.right) continue;
      Symbol& eaten = symbols[symbol.after];
      symbol.id = merge.id;
      symbol.after = eaten.after;
      eaten.id = -1;
      if (symbol.after != kNone) symbols[symbol.after].before = merge.at;
      consider(merge.at);
      consider(symbol.before);
    }
    for (size_t at = 0; at != kNone; at = symbols[at].after) tokens.push_back(symbols[at].id);
  }

  bool ignore_merges_ = false;
  std::vector<std::string> tokens_;
  std::vector<bool> special_;
  std::unordered_map<std::string, int64_t> ids_;
  std::array<int64_t, 256> byte_ids_{};
  std::unordered_map<uint64_t, std::pair<int64_t, int64_t>> merges_;  // rank and id by pair of ids
  std::vector<std::pair<std::string, int64_t>> added_;
};

}  // namespace mobilemoe
