// Safetensors files from whoever wrote them: everything is checked before a byte is allocated for the data.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "json.h"

namespace clora {

// One tensor: `dtype` as the format names it (F32, BF16, I64, ...), `data` as it lies in the file
// (little-endian).
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

// All tensors of a file. Throws BadFile, in one sentence that names the file, for what is no regular file, is
// cut off or longer than its header says, has a header that is no JSON of the format or is larger than a
// megabyte, tensors whose bytes overlap, leave holes or are not what shape and dtype need, or more than
// `most_bytes` of data.
std::map<std::string, StoredTensor> read_safetensors(const std::string& path, int64_t most_bytes);

// One fp32 tensor, under a name beside `path` that takes its place when it is whole. Throws BadFile.
void write_safetensors(const std::string& path, const std::string& name, const std::vector<int64_t>& shape,
                       const float* values);

// The bytes of a small text file. Throws BadFile for one of more than `most_bytes`.
std::string read_small_file(const std::string& path, int64_t most_bytes);

}  // namespace clora
