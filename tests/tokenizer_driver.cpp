// Reads a tokenizer.json and lines that are JSON strings; prints their token ids, and in JSON the text of these.
#include <iostream>

#include "tokenizer.h"

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("give a tokenizer.json");
    const mobilemoe::Tokenizer tokenizer(argv[1]);
    for (std::string line; std::getline(std::cin, line);) {
      std::string text;
      for (const int64_t token : tokenizer.encode(mobilemoe::JsonReader(line).read().string)) {
        std::cout << token << ' ';
        text += tokenizer.bytes(token);
      }
      std::cout << '|';
      for (const unsigned char byte : text) {
        const char* digits = "0123456789abcdef";
        std::cout << digits[byte >> 4] << digits[byte & 15];
      }
      std::cout << '\n';
    }
  } catch (const std::exception& error) {
    std::cout << "error: " << error.what() << '\n';
    return 1;
  }
}
