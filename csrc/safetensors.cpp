#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <tuple>

namespace clora {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr int64_t MOST_HEADER = 1 << 20;

struct Entry {
  std::string name, dtype;
  std::vector<int64_t> shape;
  int64_t begin = -1, end = -1;
};

int64_t item_size(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {
      {"F64", 8}, {"I64", 8},  {"U64", 8}, {"F32", 4}, {"I32", 4},  {"U32", 4},     {"F16", 2},    {"I16", 2},
      {"U16", 2}, {"BF16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) throw BadFile("has a tensor of the unknown dtype '" + shown(dtype) + "'");
  return found->second;
}

// Bytes of a tensor of this shape, or none where they are more than a file can have.
std::optional<int64_t> needed_bytes(const Entry& entry) {
  int64_t bytes = item_size(entry.dtype);
  for (const int64_t size : entry.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return bytes;
}

Entry read_entry(JsonReader& json, const std::string& name) {
  Entry entry{name, "", {}};
  int fields = 0;
  json.object([&](const std::string& key) {
    ++fields;
    if (key == "dtype") {
      entry.dtype = json.string();
    } else if (key == "shape") {
      json.array([&] { entry.shape.push_back(json.count()); });
    } else if (key == "data_offsets") {
      std::vector<int64_t> offsets;
      json.array([&] { offsets.push_back(json.count()); });
      if (offsets.size() != 2) throw BadFile("has data_offsets that are not two");
      std::tie(entry.begin, entry.end) = std::tie(offsets[0], offsets[1]);
    } else {
      throw BadFile("has the unknown field '" + shown(key) + "' in its header");
    }
  });
  if (fields != 3) throw BadFile("has a tensor without dtype, shape or data_offsets: '" + shown(name) + "'");
  return entry;
}

std::vector<Entry> read_header(const std::string& text) {
  std::vector<Entry> entries;
  JsonReader json(text);
  json.object([&](const std::string& key) {
    if (key == "__metadata__") {
      json.object([&](const std::string&) { json.string(); });
    } else {
      entries.push_back(read_entry(json, key));
    }
  });
  json.end();
  return entries;
}

// By place; they must fill the data exactly, one after the other.
void check_places(std::vector<Entry>& entries, int64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  int64_t at = 0;
  for (const Entry& entry : entries) {
    if (entry.begin > entry.end || entry.end > data_bytes) {
      throw BadFile("has the tensor '" + shown(entry.name) + "' outside of its " +
                    std::to_string(data_bytes) + " bytes of data");
    }
    if (entry.begin != at) {
      throw BadFile("has tensors that overlap or leave a hole before '" + shown(entry.name) + "'");
    }
    if (needed_bytes(entry) != std::optional(entry.end - entry.begin)) {
      throw BadFile("has " + std::to_string(entry.end - entry.begin) + " bytes for '" + shown(entry.name) +
                    "', which is not what its shape and dtype need");
    }
    at = entry.end;
  }
  if (at != data_bytes)
    throw BadFile("has " + std::to_string(data_bytes - at) + " bytes that belong to no tensor");
}

std::ifstream open_regular(const std::string& path, int64_t& size) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (error || !std::filesystem::is_regular_file(status))
    throw BadFile("is no regular file that can be read");
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw BadFile("cannot be read");
  size = static_cast<int64_t>(file.tellg());
  file.seekg(0);
  return file;
}

void read_exactly(std::ifstream& file, char* into, int64_t bytes) {
  if (!file.read(into, bytes) || file.gcount() != bytes) throw BadFile("is cut off");
}

std::map<std::string, StoredTensor> read(const std::string& path, int64_t most_bytes) {
  int64_t size = 0;
  std::ifstream file = open_regular(path, size);
  if (size < 8) throw BadFile("is too short for a safetensors file");
  uint64_t header_bytes = 0;
  read_exactly(file, reinterpret_cast<char*>(&header_bytes), 8);
  if (header_bytes > static_cast<uint64_t>(MOST_HEADER) || static_cast<int64_t>(header_bytes) > size - 8) {
    throw BadFile("says that its header has " + std::to_string(header_bytes) +
                  " bytes, more than there are or may be");
  }
  const int64_t data_bytes = size - 8 - static_cast<int64_t>(header_bytes);
  if (data_bytes > most_bytes) {
    throw BadFile("has " + std::to_string(data_bytes) + " bytes of data, at most " +
                  std::to_string(most_bytes) + " are read");
  }
  std::string header(header_bytes, '\0');
  read_exactly(file, header.data(), static_cast<int64_t>(header_bytes));
  std::vector<Entry> entries = read_header(header);
  check_places(entries, data_bytes);

  std::map<std::string, StoredTensor> found;
  for (Entry& entry : entries) {
    StoredTensor tensor{entry.dtype, std::move(entry.shape), std::vector<char>(entry.end - entry.begin)};
    read_exactly(file, tensor.data.data(), entry.end - entry.begin);
    found.emplace(entry.name, std::move(tensor));
  }
  return found;
}

}  // namespace

std::map<std::string, StoredTensor> read_safetensors(const std::string& path, int64_t most_bytes) {
  try {
    return read(path, most_bytes);
  } catch (const BadFile& error) {
    throw BadFile(path + ": " + error.what() + "; write it again");
  }
}

void write_safetensors(const std::string& path, const std::string& name, const std::vector<int64_t>& shape,
                       const float* values) {
  int64_t count = 1;
  std::string sizes;
  for (const int64_t size : shape) {
    count *= size;
    sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
  }
  std::string header = "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[" + sizes + "],\"data_offsets\":[0," +
                       std::to_string(count * 4) + "]}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t header_bytes = header.size();
  const std::string partial = path + ".part";
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(&header_bytes), 8);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(reinterpret_cast<const char*>(values), count * 4);
  file.close();
  if (!file || std::rename(partial.c_str(), path.c_str()) != 0) {
    std::remove(partial.c_str());
    throw BadFile(path + ": cannot be written (" + std::strerror(errno) + "); choose another place");
  }
}

std::string read_small_file(const std::string& path, int64_t most_bytes) {
  try {
    int64_t size = 0;
    std::ifstream file = open_regular(path, size);
    if (size > most_bytes) throw BadFile("is larger than " + std::to_string(most_bytes) + " bytes");
    std::string text(size, '\0');
    read_exactly(file, text.data(), size);
    return text;
  } catch (const BadFile& error) {
    throw BadFile(path + ": " + error.what());
  }
}

}  // namespace clora
