// A reader of JSON, for tokenizer.json.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mobilemoe {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kList, kObject };

  Kind kind = Kind::kNull;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> list;
  std::vector<std::pair<std::string, Json>> object;

  // A member of an object; null where there is none.
  const Json& operator[](const std::string& name) const {
    static const Json null;
    for (const auto& [key, value] : object) {
      if (key == name) return value;
    }
    return null;
  }

  bool is(const std::string& text) const { return kind == Kind::kString && string == text; }
  bool is_true() const { return kind == Kind::kBool && boolean; }
  bool is_null() const { return kind == Kind::kNull; }
};

inline void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

// Throws std::runtime_error for what is not JSON.
class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value = read_value(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  [[noreturn]] void fail() const { throw std::runtime_error("no JSON at byte " + std::to_string(at_)); }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || (text_[at_] >= '\t' && text_[at_] <= '\r'))) ++at_;
  }

  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) fail();
    at_ += word.size();
  }

  Json read_value(int depth) {
    skip_space();
    if (depth > kDeepest || at_ >= text_.size()) fail();
    Json value;
    const char c = text_[at_];
    if (c == '{') {
      value.kind = Json::Kind::kObject;
      ++at_;
      if (take('}')) return value;
      do {
        skip_space();
        std::string name = read_string();
        if (!take(':')) fail();
        value.object.emplace_back(std::move(name), read_value(depth + 1));
      } while (take(','));
      if (!take('}')) fail();
    } else if (c == '[') {
      value.kind = Json::Kind::kList;
      ++at_;
      if (take(']')) return value;
      do {
        value.list.push_back(read_value(depth + 1));
      } while (take(','));
      if (!take(']')) fail();
    } else if (c == '"') {
      value.kind = Json::Kind::kString;
      value.string = read_string();
    } else if (c == 't' || c == 'f') {
      value.kind = Json::Kind::kBool;
      value.boolean = c == 't';
      expect(value.boolean ? "true" : "false");
    } else if (c == 'n') {
      expect("null");
    } else {
      value.kind = Json::Kind::kNumber;
      char* end = nullptr;
      value.number = std::strtod(text_.c_str() + at_, &end);
      if (end == text_.c_str() + at_) fail();
      at_ = end - text_.c_str();
    }
    return value;
  }

  uint32_t read_hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ < text_.size() ? text_[at_] : 'x';
      if (c >= '0' && c <= '9') {
        code = code * 16 + (c - '0');
      } else if ((c | 32) >= 'a' && (c | 32) <= 'f') {
        code = code * 16 + ((c | 32) - 'a' + 10);
      } else {
        fail();
      }
    }
    return code;
  }

  std::string read_string() {
    if (at_ >= text_.size() || text_[at_] != '"') fail();
    std::string out;
    for (++at_; at_ < text_.size() && text_[at_] != '"';) {
      if (text_[at_] != '\\') {
        out += text_[at_++];
        continue;
      }
      if (++at_ >= text_.size()) fail();
      const char c = text_[at_++];
      const std::string names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
      if (const size_t known = names.find(c); known != std::string::npos) {
        out += values[known];
      } else if (c == 'u') {
        uint32_t code = read_hex();
        if (code >= 0xD800 && code < 0xDC00) {
          expect("\\u");
          const uint32_t low = read_hex();
          if (low < 0xDC00 || low > 0xDFFF) fail();
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        append_utf8(out, code);
      } else {
        fail();
      }
    }
    if (at_ >= text_.size()) fail();
    ++at_;
    return out;
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace mobilemoe
