// The batcher with real tensors under many threads: each result is, bit for bit, what `sample` makes alone.
//
//   batcher_stress [requests] [threads] [seed]
//
// The engine is written here and reads every input that a request has, to its end and no further. Requests
// are of two sizes; some are cancelled, have too little time, fail in their own callback or ask for too much.
// Prints one line and exits with 0, or says what is wrong and exits with 1.
#include <ATen/CPUGeneratorImpl.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "../batcher.h"
#include "../sample.h"

namespace {

using clora::Inputs;
using clora::Outcome;
using clora::Request;

constexpr int64_t CHANNELS = 4, TEXT_WIDTH = 6, ANGLES = 3;

std::atomic<int64_t> faults{0};

void fail(const std::string& what) {
  if (faults++ < 10) std::fprintf(stderr, "batcher_stress: %s\n", what.c_str());
}

// A velocity of which each value depends on its own row alone, and on all that the row has.
struct Network : clora::Engine {
  at::Tensor denoise(const Inputs& in) override {
    const auto x = in.x.accessor<float, 3>(), refs = in.refs.accessor<float, 3>(),
               text = in.text.accessor<float, 3>();
    const auto cos = in.cos.accessor<float, 2>(), sin = in.sin.accessor<float, 2>();
    const auto step = in.step.accessor<int64_t, 1>(), text_len = in.text_len.accessor<int64_t, 1>();
    at::Tensor out = at::empty(in.x.sizes());
    auto v = out.accessor<float, 3>();
    for (int64_t b = 0; b < x.size(0); ++b) {
      const float said = text[b][text_len[b] - 1][text_len[b] % TEXT_WIDTH];
      for (int64_t t = 0; t < x.size(1); ++t) {
        const int64_t place = (t + step[b]) % cos.size(0);
        const float turn = cos[place][t % ANGLES] - sin[cos.size(0) - 1 - place][t % ANGLES];
        for (int64_t c = 0; c < x.size(2); ++c)
          v[b][t][c] = 0.3F * x[b][t][c] + turn * refs[b][t % refs.size(1)][c] - said;
      }
    }
    return out;
  }
};

// What all requests of one size share.
struct Bucket {
  int64_t id, tokens, refs, text;
  at::Tensor cos = at::randn({tokens + refs + text, ANGLES}), sin = at::randn({tokens + refs + text, ANGLES});
};

struct Asked {
  Inputs conditions;  // of one sample
  at::Tensor noise, answer;
  uint64_t seed = 0;
  Outcome outcome = Outcome::failed;
  std::atomic<int> answers{0};
};

at::Generator generator(uint64_t seed) {
  return at::detail::createCPUGenerator(seed);
}

at::Tensor first_draw(const Bucket& bucket, at::Generator& from) {
  return at::empty({bucket.tokens, CHANNELS}).normal_(0.0, 1.0, from);
}

Request request_for(Asked& asked, const Bucket& bucket, std::mt19937_64& random) {
  const auto dice = [&](int sides) { return static_cast<int64_t>(random() % sides); };
  asked.seed = random();
  Request request;
  request.bucket = bucket.id;
  request.generator = generator(asked.seed);
  asked.noise = request.noise = first_draw(bucket, request.generator);
  request.refs = at::empty({bucket.refs, CHANNELS}).normal_(0.0, 1.0, generator(asked.seed + 1));
  request.text = at::empty({bucket.text, TEXT_WIDTH}).normal_(0.0, 1.0, generator(asked.seed + 2));
  request.text_len = 1 + dice(static_cast<int>(bucket.text));
  request.cos = bucket.cos;
  request.sin = bucket.sin;
  request.effect = "effect " + std::to_string(dice(50));
  if (dice(10) == 0) request.timeout = static_cast<double>(dice(300)) * 1e-6;
  if (dice(20) == 0)
    request.on_step = [at = dice(8)](int done, int) {
      if (done == at) throw std::runtime_error("the client has gone");
    };
  asked.conditions = {{},
                      request.refs.unsqueeze(0),
                      request.text.unsqueeze(0),
                      bucket.cos,
                      bucket.sin,
                      {},
                      at::full({1}, request.text_len, at::kLong)};
  request.on_done = [&asked](Outcome outcome, const at::Tensor& x0, const std::string&) {
    ++asked.answers;
    asked.outcome = outcome;
    asked.answer = x0;
  };
  return request;
}

void submit_some(clora::Batcher& batcher, std::vector<Asked>& asked, const std::vector<Bucket>& buckets,
                 uint64_t seed) {
  std::mt19937_64 random(seed);
  for (Asked& one : asked) {
    const Bucket& bucket = buckets[random() % buckets.size()];
    while (true) {
      try {
        const uint64_t ticket = batcher.submit(request_for(one, bucket, random));
        if (random() % 10 == 0) batcher.cancel(ticket);
        break;
      } catch (const clora::QueueFull&) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
    // One that must be refused at once, and touch nothing.
    if (random() % 20 == 0) {
      Asked bad;
      Request request = request_for(bad, bucket, random);
      request.text_len = bucket.text + 1;
      try {
        batcher.submit(std::move(request));
        fail("a text_len beyond the text was taken");
      } catch (const c10::ValueError&) {
      }
    }
  }
}

void check(Asked& asked, const at::Tensor& sigmas, clora::Sampler sampler) {
  if (asked.answers != 1) return fail("answered " + std::to_string(asked.answers) + " times");
  if (asked.outcome != Outcome::done) return;
  Network network;
  at::Generator own = generator(asked.seed);
  at::empty_like(asked.noise).normal_(0.0, 1.0, own);  // as the request's, past the first draw
  const at::Tensor alone = clora::sample(clora::engine_velocity(network, asked.conditions, at::kFloat),
                                         asked.noise.unsqueeze(0), {own}, sigmas, sampler, nullptr);
  if (!at::equal(alone[0], asked.answer)) fail("a result differs from that of its request alone");
}

int64_t run(int64_t requests, int threads, uint64_t seed, clora::Sampler sampler) {
  const at::Tensor sigmas = at::tensor({1.0F, 0.9545F, 0.9F, 0.75F, 0.5F, 0.3F});
  const std::vector<Bucket> buckets = {{1, 16, 16, 5}, {2, 9, 12, 7}};
  std::vector<std::vector<Asked>> asked;
  for (int i = 0; i < threads; ++i) asked.emplace_back(requests / threads);
  {
    clora::Batcher batcher(std::make_shared<Network>(), sigmas, sampler, at::kFloat, 8, 64);
    std::vector<std::thread> clients;
    for (int i = 0; i < threads; ++i)
      clients.emplace_back([&, i] { submit_some(batcher, asked[i], buckets, seed * 1000 + i); });
    for (std::thread& client : clients) client.join();
    batcher.close(/*drain=*/true, std::nullopt);
  }
  int64_t done = 0;
  for (auto& some : asked) {
    for (Asked& one : some) {
      check(one, sigmas, sampler);
      done += one.outcome == Outcome::done;
    }
  }
  return done;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t requests = argc > 1 ? std::atoll(argv[1]) : 2000;
  const int threads = argc > 2 ? std::atoi(argv[2]) : 8;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
  for (const clora::Sampler sampler : {clora::Sampler::consistency, clora::Sampler::euler}) {
    const int64_t done = run(requests, threads, seed, sampler);
    if (done < requests / 2 || done == requests) fail("odd count of results: " + std::to_string(done));
    std::printf("%s: %lld of %lld requests done\n",
                sampler == clora::Sampler::euler ? "euler" : "consistency", static_cast<long long>(done),
                static_cast<long long>(requests));
  }
  return faults == 0 ? 0 : 1;
}
