// A strict reader of JSON text that other programs wrote: values are read in order, as the caller expects
// them.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace clora {

// A file that is not what it should be; the message says where.
struct BadFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Text from a file as a message may show it: cut, and with ? for what a terminal would obey or not read.
std::string shown(std::string_view text);

// Nothing is allocated beyond the strings read. Whatever is not JSON, or not of the kind asked for, throws
// BadFile.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  // Calls `member` with every key, which must read its value. Throws for a key that comes twice.
  void object(const std::function<void(const std::string& key)>& member);
  // Calls `element` for every element, which must read it.
  void array(const std::function<void()>& element);
  std::string string();
  int64_t count();  // 0 .. 2^53
  double number();
  void skip();  // a value of any kind, at most 64 deep
  void end();   // nothing but blanks is left

 private:
  [[noreturn]] void bad(const std::string& what) const;
  char peek();
  void expect(char wanted);
  void escape(std::string& into);
  uint32_t hex();
  std::string_view digits();

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace clora
