#include "json.h"

#include <cmath>
#include <cstdlib>
#include <set>

namespace clora {
namespace {

constexpr int MOST_DEPTH = 64;
constexpr int64_t MOST_COUNT = int64_t{1} << 53;

void append_utf8(uint32_t code, std::string& into) {
  const auto byte = [&](uint32_t value) { into.push_back(static_cast<char>(value)); };
  if (code < 0x80) {
    byte(code);
  } else if (code < 0x800) {
    byte(0xc0 | code >> 6);
    byte(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    byte(0xe0 | code >> 12);
    byte(0x80 | (code >> 6 & 0x3f));
    byte(0x80 | (code & 0x3f));
  } else {
    byte(0xf0 | code >> 18);
    byte(0x80 | (code >> 12 & 0x3f));
    byte(0x80 | (code >> 6 & 0x3f));
    byte(0x80 | (code & 0x3f));
  }
}

}  // namespace

std::string shown(std::string_view text) {
  std::string found(text.substr(0, 60));
  for (char& one : found) {
    if (one < 0x20 || one > 0x7e) one = '?';
  }
  return found;
}

void JsonReader::bad(const std::string& what) const {
  throw BadFile("its JSON is damaged at byte " + std::to_string(at_) + " (" + what + ")");
}

char JsonReader::peek() {
  while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  return at_ < text_.size() ? text_[at_] : '\0';
}

void JsonReader::expect(char wanted) {
  if (peek() != wanted || at_ >= text_.size()) bad(std::string("expected ") + wanted);
  ++at_;
}

void JsonReader::object(const std::function<void(const std::string& key)>& member) {
  if (++depth_ > MOST_DEPTH) bad("too deep");
  expect('{');
  std::set<std::string> seen;
  if (peek() != '}') {
    while (true) {
      const std::string key = string();
      if (!seen.insert(key).second) bad("a key twice");
      expect(':');
      member(key);
      if (peek() != ',') break;
      ++at_;
    }
  }
  expect('}');
  --depth_;
}

void JsonReader::array(const std::function<void()>& element) {
  if (++depth_ > MOST_DEPTH) bad("too deep");
  expect('[');
  if (peek() != ']') {
    while (true) {
      element();
      if (peek() != ',') break;
      ++at_;
    }
  }
  expect(']');
  --depth_;
}

std::string JsonReader::string() {
  expect('"');
  std::string found;
  while (at_ < text_.size() && text_[at_] != '"') {
    const char next = text_[at_++];
    if (static_cast<unsigned char>(next) < 0x20) bad("a control character in a string");
    if (next == '\\') {
      escape(found);
    } else {
      found.push_back(next);
    }
  }
  if (at_ >= text_.size()) bad("a string without an end");
  ++at_;
  return found;
}

void JsonReader::escape(std::string& into) {
  const char kind = at_ < text_.size() ? text_[at_++] : '\0';
  static constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
  if (const size_t place = from.find(kind); kind != '\0' && place != std::string_view::npos) {
    into.push_back(to[place]);
    return;
  }
  if (kind != 'u') bad("an unknown escape");
  uint32_t code = hex();
  if (code >= 0xd800 && code < 0xdc00) {
    if (text_.substr(at_, 2) != "\\u") bad("half a surrogate pair");
    at_ += 2;
    const uint32_t low = hex();
    if (low < 0xdc00 || low > 0xdfff) bad("half a surrogate pair");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  } else if (code >= 0xdc00 && code < 0xe000) {
    bad("half a surrogate pair");
  }
  append_utf8(code, into);
}

uint32_t JsonReader::hex() {
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i) {
    const char digit = at_ < text_.size() ? text_[at_++] : '\0';
    const size_t value = std::string_view("0123456789abcdef").find(static_cast<char>(std::tolower(digit)));
    if (digit == '\0' || value == std::string_view::npos) bad("a bad \\u escape");
    code = code * 16 + static_cast<uint32_t>(value);
  }
  return code;
}

std::string_view JsonReader::digits() {
  const size_t start = at_;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
  if (at_ == start || (text_[start] == '0' && at_ - start > 1)) bad("expected a number");
  return text_.substr(start, at_ - start);
}

int64_t JsonReader::count() {
  peek();
  const std::string_view found = digits();
  if (found.size() > 16) bad("a number too large");
  int64_t value = 0;
  for (const char digit : found) value = value * 10 + (digit - '0');
  const char next = at_ < text_.size() ? text_[at_] : '\0';
  if (value > MOST_COUNT || next == '.' || next == 'e' || next == 'E')
    bad("expected a whole number up to 2^53");
  return value;
}

double JsonReader::number() {
  peek();
  const size_t start = at_;
  if (at_ < text_.size() && text_[at_] == '-') ++at_;
  digits();
  if (at_ < text_.size() && text_[at_] == '.') {
    const size_t point = ++at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == point) bad("expected a number");
  }
  if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
    ++at_;
    if (at_ < text_.size() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
    const size_t exponent = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == exponent) bad("expected a number");
  }
  const double value = std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr);
  if (!std::isfinite(value)) bad("a number too large");
  return value;
}

void JsonReader::skip() {
  switch (peek()) {
    case '{':
      return object([&](const std::string&) { skip(); });
    case '[':
      return array([&] { skip(); });
    case '"':
      string();
      return;
    default:
      for (const std::string_view word : {"true", "false", "null"}) {
        if (text_.substr(at_, word.size()) == word) {
          at_ += word.size();
          return;
        }
      }
      number();
  }
}

void JsonReader::end() {
  peek();
  if (at_ != text_.size()) bad("more after its end");
}

}  // namespace clora
