#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <mutex>

#include "engine.h"

namespace clora {
namespace {

class AotiEngine : public Engine {
 public:
  explicit AotiEngine(const std::string& package) : loader_(package, "model", /*run_single_threaded=*/true) {}

  at::Tensor denoise(const Inputs& in) override {
    const std::lock_guard<std::mutex> turn(mutex_);
    std::vector<at::Tensor> outputs =
        loader_.run({in.x, in.refs, in.text, in.cos, in.sin, in.step, in.text_len});
    TORCH_CHECK(outputs.size() == 1, "the package gave ", outputs.size(), " tensors, 1 was expected");
    return outputs[0];
  }

 private:
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

std::unique_ptr<Engine> open_aoti(const std::string& package) {
  return std::make_unique<AotiEngine>(package);
}

}  // namespace clora
