// SHA-256 (FIPS 180-4) of a file: native code is loaded only when it is what the manifest says.
#pragma once

#include <string>

namespace clora {

// In hex, read in pieces. Throws BadFile where the file cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace clora
