#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace clora {
namespace {

using Metadata = std::unordered_map<std::string, std::string>;

// As clora.export.aoti writes them.
std::optional<Shapes> read_shapes(const Metadata& metadata) {
  Shapes shapes;
  const std::vector<std::pair<const char*, int64_t*>> numbers = {{"clora_batch", &shapes.batch},
                                                                 {"clora_tokens", &shapes.tokens},
                                                                 {"clora_text", &shapes.text},
                                                                 {"clora_channels", &shapes.channels},
                                                                 {"clora_text_width", &shapes.text_width},
                                                                 {"clora_angles", &shapes.angles}};
  for (const auto& [name, number] : numbers) {
    const auto found = metadata.find(name);
    if (found == metadata.end()) return std::nullopt;
    *number = std::strtoll(found->second.c_str(), nullptr, 10);
  }
  const auto dtype = metadata.find("clora_dtype");
  if (dtype == metadata.end()) return std::nullopt;
  shapes.dtype = dtype->second == "bfloat16" ? at::kBFloat16 : at::kFloat;
  shapes.refs = shapes.tokens;
  return shapes;
}

// The sizes of inputs that fit each other.
Shapes shapes_of(const Inputs& in) {
  TORCH_CHECK_VALUE(in.x.dim() == 3 && in.refs.dim() == 3 && in.text.dim() == 3 && in.cos.dim() == 2 &&
                        in.step.dim() == 1 && in.text_len.dim() == 1,
                    "x, refs and text must have three dimensions, cos two, step and text_len one");
  const int64_t B = in.x.size(0), joint = in.x.size(1) + in.refs.size(1) + in.text.size(1);
  TORCH_CHECK_VALUE(in.refs.size(0) == B && in.text.size(0) == B && in.step.size(0) == B &&
                        in.text_len.size(0) == B && in.refs.size(2) == in.x.size(2),
                    "x ", in.x.sizes(), ", refs ", in.refs.sizes(), ", text ", in.text.sizes(), ", step ",
                    in.step.sizes(), " and text_len ", in.text_len.sizes(), " are not of one batch");
  TORCH_CHECK_VALUE(in.cos.sizes() == in.sin.sizes() && in.cos.size(0) == joint, "cos ", in.cos.sizes(),
                    " and sin ", in.sin.sizes(), " are not the positions of ", joint, " tokens");
  TORCH_CHECK_VALUE(in.refs.scalar_type() == in.x.scalar_type() &&
                        in.text.scalar_type() == in.x.scalar_type() && in.cos.scalar_type() == at::kFloat &&
                        in.sin.scalar_type() == at::kFloat && in.step.scalar_type() == at::kLong &&
                        in.text_len.scalar_type() == at::kLong,
                    "x, refs and text must be of one type, cos and sin float32, step and text_len int64");
  return {B,
          in.x.size(1),
          in.refs.size(1),
          in.text.size(1),
          in.x.size(2),
          in.text.size(2),
          in.cos.size(1),
          in.x.scalar_type()};
}

class AotiEngine : public Engine {
 public:
  explicit AotiEngine(const std::string& package)
      : loader_(package, "model", /*run_single_threaded=*/true),
        taken_(read_shapes(loader_.get_metadata())) {}

  at::Tensor denoise(const Inputs& in) override {
    const Shapes given = shapes_of(in);
    const std::string fault = taken_ ? misfit(given, *taken_) : "";
    TORCH_CHECK_VALUE(fault.empty(), fault);
    const std::lock_guard<std::mutex> turn(mutex_);
    std::vector<at::Tensor> inputs = {in.x, in.refs, in.text, in.cos, in.sin, in.step, in.text_len};
    // The compiled code reads by the strides of whole tensors, whatever a tensor says of its own.
    for (at::Tensor& one : inputs) one = one.contiguous();
    std::vector<at::Tensor> outputs = loader_.run(inputs);
    TORCH_CHECK(outputs.size() == 1, "the package gave ", outputs.size(), " tensors, 1 was expected");
    return outputs[0];
  }

 private:
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
  const std::optional<Shapes> taken_;
};

}  // namespace

std::string misfit(const Shapes& given, const Shapes& taken) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::vector<std::tuple<const char*, int64_t, int64_t>> widths = {
      {"'refs' is of", given.channels, taken.channels},
      {"'text' is of", given.text_width, taken.text_width},
      {"'cos' is of", given.angles, taken.angles}};
  for (const auto& [what, has, takes] : widths) {
    if (has != takes)
      return std::string(what) + " width " + number(has) + ", the package takes " + number(takes);
  }
  if (given.batch < 1 || given.batch > taken.batch)
    return "batch of " + number(given.batch) + " is beyond the package's " + number(taken.batch);
  const std::vector<std::tuple<const char*, int64_t, int64_t>> counts = {
      {"result", given.tokens, taken.tokens},
      {"references", given.refs, taken.refs},
      {"text", given.text, taken.text}};
  for (const auto& [what, has, most] : counts) {
    if (has < 2 || has > most)
      return std::string(what) + " of " + number(has) + " tokens, the package takes 2 to " + number(most);
  }
  if (given.dtype != taken.dtype)
    return std::string("network is asked for in ") + c10::toString(given.dtype) + ", the package is in " +
           c10::toString(taken.dtype);
  return "";
}

std::optional<Shapes> package_shapes(const std::string& package) {
  return read_shapes(torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(package, "model"));
}

std::unique_ptr<Engine> open_aoti(const std::string& package) {
  return std::make_unique<AotiEngine>(package);
}

}  // namespace clora
