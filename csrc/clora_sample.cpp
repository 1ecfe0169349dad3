// clora-sample: latents from an AOTInductor package, without Python.
//
//   clora-sample --artefact DIR --conditions IN.safetensors --output OUT.safetensors
//   clora-sample --package FILE --sigmas 1,0.9,0.75 [--sampler euler] [--precision bfloat16] --conditions ...
//
// IN holds, for a batch of B (T tokens of the result, R of the references, M of the padded text, C channels,
// E width of a head, J = T + R + M):
//   refs (B, R, C), text (B, M, D), cos and sin (J, E / 2) F32, text_len (B) I64, seed (B) I64, and
//   grid (2) I64, the result's height and width in tokens: the initial noise is the seeds', in the stock
//   pipeline's order; or noise (B, T, C) F32 in its place.
// OUT holds x0 (B, T, C) F32. With --artefact the package must have the SHA-256 that its manifest says, and
// fit this torch and CPU, before it is loaded; noise levels and sampler are the manifest's. --package loads
// what it is given.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <optional>

#include "json.h"
#include "safetensors.h"
#include "sample.h"
#include "sha256.h"

namespace {

using clora::BadFile;
using clora::StoredTensor;

constexpr int64_t MOST_CONDITIONS = int64_t{4} << 30, MOST_MANIFEST = 16 << 20;
constexpr const char* USAGE =
    "usage: clora-sample (--artefact DIR | --package FILE --sigmas 1,0.9,... [--sampler consistency|euler]"
    " [--precision float32|bfloat16]) --conditions IN.safetensors --output OUT.safetensors [--threads N]\n";

struct BadUse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Network {
  std::string package;
  std::vector<float> sigmas;
  std::string sampler = "consistency", precision = "float32";
};

std::map<std::string, std::string> read_flags(int argc, char** argv) {
  static const std::vector<std::string> known = {"--artefact",  "--package",    "--sigmas", "--sampler",
                                                 "--precision", "--conditions", "--output", "--threads"};
  std::map<std::string, std::string> flags;
  for (int i = 1; i < argc; i += 2) {
    if (std::find(known.begin(), known.end(), argv[i]) == known.end()) {
      throw BadUse("unknown option '" + std::string(argv[i]) + "'");
    }
    if (i + 1 == argc || !flags.emplace(argv[i], argv[i + 1]).second) {
      throw BadUse(std::string(argv[i]) + " needs one value");
    }
  }
  const bool from_artefact = flags.count("--artefact") > 0;
  if (from_artefact == (flags.count("--package") > 0)) throw BadUse("give --artefact or --package");
  for (const char* name : {"--sigmas", "--sampler", "--precision"}) {
    if (from_artefact && flags.count(name))
      throw BadUse(std::string(name) + " is the artefact's own; leave it out");
  }
  if (!from_artefact && !flags.count("--sigmas")) throw BadUse("--package needs --sigmas");
  for (const char* name : {"--conditions", "--output"}) {
    if (!flags.count(name)) throw BadUse(std::string(name) + " is missing");
  }
  return flags;
}

std::vector<float> parse_sigmas(const std::string& text) {
  std::vector<float> sigmas;
  const char* at = text.c_str();
  while (true) {
    char* end = nullptr;
    sigmas.push_back(std::strtof(at, &end));
    if (end == at || (*end != ',' && *end != '\0'))
      throw BadUse("--sigmas: '" + text + "' is no list like 1,0.9,0.75");
    if (*end == '\0') return sigmas;
    at = end + 1;
  }
}

// As clora.method.flow.few_step_sigmas: in fp64, rounded once.
std::vector<float> few_step_sigmas(int64_t num_steps, double shift) {
  std::vector<float> sigmas;
  for (int64_t i = num_steps; i > 0; --i) {
    const double u = static_cast<double>(i) / static_cast<double>(num_steps);
    sigmas.push_back(static_cast<float>(shift * u / (1.0 + (shift - 1.0) * u)));
  }
  return sigmas;
}

struct Manifest {
  std::string format, precision, sampler, platform, torch, sha256;
  int64_t num_steps = 0;
  double shift = 0;
};

Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json", text = clora::read_small_file(path, MOST_MANIFEST);
  Manifest found;
  clora::JsonReader json(text);
  try {
    json.object([&](const std::string& key) {
      const std::map<std::string, std::string*> texts = {{"format", &found.format},
                                                         {"precision", &found.precision},
                                                         {"sampler", &found.sampler},
                                                         {"platform", &found.platform}};
      if (const auto field = texts.find(key); field != texts.end()) {
        *field->second = json.string();
      } else if (key == "num_steps") {
        found.num_steps = json.count();
      } else if (key == "shift") {
        found.shift = json.number();
      } else if (key == "versions") {
        json.object([&](const std::string& name) {
          name == "torch" ? void(found.torch = json.string()) : json.skip();
        });
      } else if (key == "files") {
        json.object([&](const std::string& name) {
          if (name != "model.pt2") return json.skip();
          json.object([&](const std::string& field) {
            field == "sha256" ? void(found.sha256 = json.string()) : json.skip();
          });
        });
      } else {
        json.skip();
      }
    });
    json.end();
  } catch (const BadFile& error) {
    throw BadFile(path + ": " + error.what() + "; export again");
  }
  return found;
}

// The package of an artefact that is what its manifest says, for this torch and this CPU.
Network open_artefact(const std::string& folder) {
  const Manifest manifest = read_manifest(folder);
  if (manifest.format != "aoti")
    throw BadFile(folder + ": is of format '" + clora::shown(manifest.format) + "', not aoti");
  if (manifest.num_steps < 1 || manifest.num_steps > 1000 || !(manifest.shift > 0)) {
    throw BadFile(folder + ": its manifest has no schedule; export again");
  }
  if (const std::string here = TORCH_VERSION;
      manifest.torch.substr(0, manifest.torch.find('+')) != here.substr(0, here.find('+'))) {
    throw BadFile(folder + ": was compiled for torch " + clora::shown(manifest.torch) + ", this is " + here +
                  "; export again");
  }
  const std::string cpu = at::get_cpu_capability(),
                    made = manifest.platform.substr(manifest.platform.rfind(' ') + 1);
  if (made != cpu) {
    throw BadFile(folder + ": was compiled for a CPU with " + clora::shown(made) + ", this one has " + cpu +
                  "; export on this machine");
  }
  const std::string package = folder + "/model.pt2";
  if (clora::sha256_of_file(package) != manifest.sha256) {
    throw BadFile(package + ": is not what was exported (its SHA-256 differs); export again");
  }
  return {package, few_step_sigmas(manifest.num_steps, manifest.shift), manifest.sampler, manifest.precision};
}

at::ScalarType type_named(const std::string& dtype) {
  static const std::map<std::string, at::ScalarType> types = {{"F32", at::kFloat},
                                                              {"F64", at::kDouble},
                                                              {"F16", at::kHalf},
                                                              {"BF16", at::kBFloat16},
                                                              {"I64", at::kLong}};
  const auto found = types.find(dtype);
  if (found == types.end()) throw BadFile("is of dtype " + dtype);
  return found->second;
}

// The tensors of a file of conditions, with their data.
class Conditions {
 public:
  explicit Conditions(const std::string& path)
      : path_(path), stored_(clora::read_safetensors(path, MOST_CONDITIONS)) {}

  bool has(const std::string& name) const { return stored_.count(name) > 0; }

  // Of `dims` dimensions, none of them empty; whole numbers where `whole`, otherwise floating point.
  at::Tensor get(const std::string& name, int64_t dims, bool whole = false) {
    const auto found = stored_.find(name);
    if (found == stored_.end()) fail("has no tensor '" + name + "'");
    StoredTensor& stored = found->second;
    const bool right_type = (stored.dtype == "I64") == whole;
    if (static_cast<int64_t>(stored.shape.size()) != dims || stored.data.empty() || !right_type) {
      fail("its '" + name + "' is no " + (whole ? "I64" : "floating point") + " tensor of " +
           std::to_string(dims) + " dimensions");
    }
    try {
      return at::from_blob(stored.data.data(), stored.shape, at::dtype(type_named(stored.dtype))).clone();
    } catch (const BadFile& error) {
      fail("its '" + name + "' " + error.what());
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw BadFile(path_ + ": " + what + "; write it again");
  }

 private:
  std::string path_;
  std::map<std::string, StoredTensor> stored_;
};

// The result's height and width in tokens.
std::pair<int64_t, int64_t> grid_of(Conditions& given) {
  const at::Tensor grid = given.get("grid", 1, true);
  if (grid.size(0) != 2) given.fail("its 'grid' is no height and width");
  const auto h = grid[0].item<int64_t>(), w = grid[1].item<int64_t>();
  if (h < 1 || w < 1 || h > 4096 || w > 4096) given.fail("its 'grid' is no grid of tokens");
  return {h, w};
}

// As clora.method.samplers.pipeline_order.
at::Tensor pipeline_order(const at::Tensor& noise_BTC, int64_t h, int64_t w) {
  const int64_t B = noise_BTC.size(0), C = noise_BTC.size(2);
  return noise_BTC.reshape({B, C / 4, h, 2, w, 2})
      .permute({0, 2, 4, 1, 3, 5})
      .reshape({B, h * w, C})
      .contiguous();
}

// What the package says it takes. It is opened as an archive for that, before any of it is loaded.
std::optional<clora::Shapes> shapes_taken(const std::string& package) {
  try {
    return clora::package_shapes(package);
  } catch (const std::exception&) {
    throw BadFile(package + ": is no package that can be read; export again");
  }
}

// Batch, tokens and widths of the conditions, which must be of one batch; T is that of noise or grid.
clora::Shapes shapes_of(Conditions& given, const clora::Inputs& in, at::ScalarType dtype) {
  const int64_t B = in.refs.size(0), C = in.refs.size(2);
  if (const int64_t seeds = given.get("seed", 1, true).size(0); seeds != B)
    given.fail("has " + std::to_string(seeds) + " seeds for a batch of " + std::to_string(B));
  int64_t T = 0;
  if (given.has("noise")) {
    const at::Tensor noise = given.get("noise", 3);
    if (noise.size(0) != B || noise.size(2) != C) given.fail("its 'noise' does not fit its 'refs'");
    T = noise.size(1);
  } else {
    const auto [h, w] = grid_of(given);
    if (C % 4 != 0) given.fail("its 'refs' have channels that are no multiple of 4, which 'grid' needs");
    T = h * w;
  }
  const int64_t R = in.refs.size(1), M = in.text.size(1);
  if (in.text.size(0) != B || in.text_len.size(0) != B || in.cos.sizes() != in.sin.sizes() ||
      in.cos.size(0) != T + R + M) {
    given.fail("its tensors are not of one batch, or cos and sin not the positions of its tokens");
  }
  if (in.text_len.min().item<int64_t>() < 1 || in.text_len.max().item<int64_t>() > M) {
    given.fail("its 'text_len' is not within its 'text'");
  }
  return {B, T, R, M, C, in.text.size(2), in.cos.size(1), dtype};
}

// One generator a sample, past the draw of the initial noise, and that noise.
at::Tensor draw(Conditions& given, const clora::Shapes& shapes, std::vector<at::Generator>& generators) {
  const at::Tensor seeds = given.get("seed", 1, true);
  std::vector<at::Tensor> drawn;
  for (int64_t b = 0; b < shapes.batch; ++b) {
    generators.push_back(at::detail::createCPUGenerator(static_cast<uint64_t>(seeds[b].item<int64_t>())));
    drawn.push_back(at::empty({shapes.tokens, shapes.channels}).normal_(0.0, 1.0, generators.back()));
  }
  if (given.has("noise")) return given.get("noise", 3).to(at::kFloat);
  const auto [h, w] = grid_of(given);
  return pipeline_order(at::stack(drawn), h, w);
}

int threads_of(const std::string& text) {
  int threads = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, threads);
  if (error != std::errc() || stop != end || threads < 1 || threads > 1024)
    throw BadUse("--threads: '" + clora::shown(text) + "' is no whole number from 1 to 1024");
  return threads;
}

void run(const std::map<std::string, std::string>& flags) {
  Network network;
  if (flags.count("--artefact")) {
    network = open_artefact(flags.at("--artefact"));
  } else {
    network.package = flags.at("--package");
    network.sigmas = parse_sigmas(flags.at("--sigmas"));
    if (flags.count("--sampler")) network.sampler = flags.at("--sampler");
    if (flags.count("--precision")) network.precision = flags.at("--precision");
  }
  if (network.precision != "float32" && network.precision != "bfloat16") {
    throw BadUse("--precision: is float32 or bfloat16, not '" + network.precision + "'");
  }
  const at::ScalarType dtype = network.precision == "float32" ? at::kFloat : at::kBFloat16;
  if (flags.count("--threads")) at::set_num_threads(threads_of(flags.at("--threads")));

  Conditions given(flags.at("--conditions"));
  clora::Inputs in;
  in.refs = given.get("refs", 3), in.text = given.get("text", 3),
  in.text_len = given.get("text_len", 1, true);
  in.cos = given.get("cos", 2).to(at::kFloat), in.sin = given.get("sin", 2).to(at::kFloat);
  const clora::Shapes shapes = shapes_of(given, in, dtype);
  // Before noise is drawn or the package loaded: both take what the file asks for.
  const std::optional<clora::Shapes> taken = shapes_taken(network.package);
  if (!taken) throw BadFile(network.package + ": does not say what sizes it takes; export again");
  if (const std::string fault = clora::misfit(shapes, *taken); !fault.empty()) given.fail("its " + fault);

  std::vector<at::Generator> generators;
  const at::Tensor noise = draw(given, shapes, generators);
  const std::unique_ptr<clora::Engine> engine = clora::open_aoti(network.package);
  in.refs = in.refs.to(dtype), in.text = in.text.to(dtype);
  const clora::Velocity velocity = clora::engine_velocity(*engine, std::move(in), dtype);
  const at::Tensor sigmas =
      at::from_blob(network.sigmas.data(), {static_cast<int64_t>(network.sigmas.size())});
  const at::Tensor x0 =
      clora::sample(velocity, noise, generators, sigmas, clora::sampler_named(network.sampler), nullptr);
  clora::write_safetensors(flags.at("--output"), "x0", x0.sizes().vec(), x0.const_data_ptr<float>());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--help") == 0) {
    std::cout << USAGE;
    return 0;
  }
  try {
    run(read_flags(argc, argv));
    return 0;
  } catch (const BadUse& error) {
    std::cerr << "clora-sample: " << error.what() << "\n" << USAGE;
    return 2;
  } catch (const BadFile& error) {
    std::cerr << "clora-sample: " << error.what() << "\n";
    return 2;
  } catch (const c10::ValueError& error) {
    std::cerr << "clora-sample: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "clora-sample: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "clora-sample: " << error.what() << "\n";
    return 1;
  }
}
