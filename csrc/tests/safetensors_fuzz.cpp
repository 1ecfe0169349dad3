// The reader of safetensors on damaged files: it answers or throws BadFile, whatever the bytes.
//
//   safetensors_fuzz FOLDER [rounds] [seed]
//
// Each round takes a sound file of a few tensors, changes bytes of it (mostly of its header: digits,
// brackets, quotes, lengths), cuts it or lengthens it, and reads it. A sanitizer finds what is read or
// counted wrongly. What is taken must have, for each tensor, as many bytes as shape and dtype say. Prints one
// line.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "../safetensors.h"

namespace {

std::string sound_file() {
  const std::string header =
      R"({"__metadata__":{"a":"\u00e9\ud83d\ude00"},"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("len":{"dtype":"I64","shape":[2],"data_offsets":[24,40]},"half":{"dtype":"BF16","shape":[],"data_offsets":[40,42]}})";
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(42, '\x2a');
}

std::string damaged(std::string file, std::mt19937_64& random) {
  static const std::string likely = "0123456789{}[]\",:\\u.eE-\x80\xff";
  const size_t header = file.size() - 42;
  for (uint64_t changes = 1 + random() % 4; changes > 0; --changes) {
    char& place = file[random() % (random() % 8 == 0 ? 8 : header)];
    place = random() % 4 == 0 ? static_cast<char>(random()) : likely[random() % likely.size()];
  }
  if (random() % 4 == 0) file.resize(random() % (file.size() + 20), '7');
  return file;
}

bool fits(const clora::StoredTensor& tensor) {
  int64_t count = 1;
  for (const int64_t size : tensor.shape) count *= size;
  const auto bytes = static_cast<int64_t>(tensor.data.size());
  return count == 0 ? bytes == 0 : bytes % count == 0 && bytes / count <= 8;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const std::string path = std::string(argv[1]) + "/fuzz.safetensors";
  const int64_t rounds = argc > 2 ? std::atoll(argv[2]) : 2000;
  std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
  int64_t taken = 0, refused = 0, wrong = 0;
  for (int64_t i = 0; i < rounds; ++i) {
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        << (i == 0 ? sound_file() : damaged(sound_file(), random));
    try {
      for (const auto& [name, tensor] : clora::read_safetensors(path, 1 << 20)) wrong += fits(tensor) ? 0 : 1;
      ++taken;
    } catch (const clora::BadFile& error) {
      wrong += i == 0 || std::strchr(error.what(), '\n') != nullptr ? 1 : 0;
      ++refused;
    }
  }
  std::remove(path.c_str());
  std::printf("%lld files: %lld taken, %lld refused, %lld wrong\n", static_cast<long long>(rounds),
              static_cast<long long>(taken), static_cast<long long>(refused), static_cast<long long>(wrong));
  return wrong == 0 && taken > 0 && refused > 0 ? 0 : 1;
}
