// The library of ONNX Runtime custom ops for the domain `ai.reattend`, version 1: `Attention` and
// `LatentAttention`, float32 and float16, on the CPU.
//
// A kernel registered for a node's name takes over from the function body that the file holds for
// it, so one file runs with and without this library. Built by `build.py` against the headers of
// ONNX Runtime 1.21 (API 21), which later versions serve.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "attend.h"

#define KERNELS(target)              \
  namespace reattend::target {       \
  extern const Kernels kernels;      \
  }
KERNELS(baseline)
#ifdef REATTEND_X86
KERNELS(avx2)
KERNELS(avx512)
#endif

namespace {

using reattend::Call;
using reattend::Cut;
using reattend::Kernels;

const Kernels& best_kernels() {
#ifdef REATTEND_X86
  __builtin_cpu_init();
  bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return reattend::avx512::kernels;
  if (fma) return reattend::avx2::kernels;
#endif
  return reattend::baseline::kernels;
}

const Kernels* chosen = &best_kernels();

struct Job {
  const Call* call;
  const Cut* cut;
  float* partial;
  std::atomic<bool> failed{false};
};

void run_one(void* data, size_t task) {
  auto& job = *static_cast<Job*>(data);
  if (!chosen->run(*job.call, *job.cut, task, job.partial)) job.failed = true;
}

void merge_one(void* data, size_t tile) {
  auto& job = *static_cast<Job*>(data);
  if (!chosen->merge(*job.call, *job.cut, tile, job.partial)) job.failed = true;
}

Ort::Status compute(const Call& call, const Ort::KernelContext& context) {
  if (call.queries == 0 || call.batch == 0) return Ort::Status{nullptr};
  Cut cut = chosen->cut(call);
  size_t tiles = call.batch * call.groups * cut.tiles;
  std::vector<float> partial(cut.splits > 1 ? tiles * cut.splits * cut.partial : 0);
  Job job{&call, &cut, partial.data()};
  context.ParallelFor(run_one, tiles * cut.splits, 0, &job);
  if (cut.splits > 1 && !job.failed) context.ParallelFor(merge_one, tiles, 0, &job);
  if (job.failed) return Ort::Status("reattend: out of memory", ORT_FAIL);
  return Ort::Status{nullptr};
}

std::string text(const char* op, const char* what) {
  return std::string("ai.reattend::") + op + ": " + what;
}

template <bool Latent>
struct Kernel {
  float scale, softcap;
  int64_t causal, window;

  explicit Kernel(const OrtKernelInfo* given) {
    Ort::ConstKernelInfo info{given};
    scale = info.GetAttribute<float>("scale");
    causal = info.GetAttribute<int64_t>("causal");
    window = info.GetAttribute<int64_t>("sliding_window");
    softcap = info.GetAttribute<float>("softcap");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* given) {
    try {
      return calculate(given).release();
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_FAIL).release();
    }
  }

  Ort::Status calculate(OrtKernelContext* given) {
    constexpr const char* op = Latent ? "LatentAttention" : "Attention";
    Ort::KernelContext context{given};
    constexpr size_t floats = Latent ? 4 : 3;
    std::vector<int64_t> shape[floats];
    const void* data[floats];
    ONNXTensorElementDataType type{};
    for (size_t i = 0; i < floats; i++) {
      Ort::ConstValue value = context.GetInput(i);
      auto info = value.GetTensorTypeAndShapeInfo();
      shape[i] = info.GetShape();
      type = info.GetElementType();
      data[i] = value.GetTensorRawData();
      size_t rank = Latent && i >= 2 ? 3 : 4;
      if (shape[i].size() != rank)
        return Ort::Status(text(op, "an input has the wrong rank").c_str(), ORT_INVALID_ARGUMENT);
    }
    auto& q = shape[0];
    Call call{};
    call.half = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    call.batch = q[0], call.heads = q[1], call.queries = q[2];
    call.scale = scale, call.softcap = softcap;
    call.causal = causal != 0, call.window = window;
    bool fits = true;
    if constexpr (Latent) {
      auto &turned = shape[1], &latent = shape[2], &rope = shape[3];
      call.groups = 1, call.capacity = latent[1];
      call.parts = rope[2] > 0 ? 2 : 1;
      for (int i = 0; i < 2; i++) {
        call.query[i] = data[i], call.key[i] = data[2 + i], call.width[i] = shape[i][3];
        fits = fits && shape[2 + i][0] == q[0] && shape[2 + i][2] == shape[i][3];
      }
      fits = fits && turned[0] == q[0] && turned[1] == q[1] && turned[2] == q[2];
      fits = fits && rope[1] == latent[1];
      call.value = data[2], call.value_width = latent[2];
    } else {
      auto &key = shape[1], &value = shape[2];
      call.groups = key[1], call.capacity = key[2], call.parts = 1;
      call.query[0] = data[0], call.key[0] = data[1], call.width[0] = q[3];
      call.value = data[2], call.value_width = value[3];
      fits = key[0] == q[0] && value[0] == q[0] && key[3] == q[3] && value[1] == key[1] &&
             value[2] == key[2] && key[1] > 0 && q[1] % key[1] == 0;
    }
    for (size_t i = 0; i < 2; i++) {
      Ort::ConstValue value = context.GetInput(floats + i);
      auto counts = value.GetTensorTypeAndShapeInfo().GetShape();
      fits = fits && counts.size() == 1 && counts[0] == q[0];
      (i ? call.length : call.start) = value.GetTensorData<int64_t>();
    }
    if (!fits)
      return Ort::Status(text(op, "shapes do not fit together").c_str(), ORT_INVALID_ARGUMENT);
    std::vector<int64_t> sizes{q[0], q[1], q[2], call.value_width};
    Ort::UnownedValue y = context.GetOutput(0, sizes);
    call.y = y.GetTensorMutableRawData();
    return compute(call, context);
  }
};

template <bool Latent>
struct Op : Ort::CustomOpBase<Op<Latent>, Kernel<Latent>, true> {
  explicit Op(ONNXTensorElementDataType type) : type_(type) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** made) const {
    try {
      *made = new Kernel<Latent>(info);
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_INVALID_GRAPH).release();
    }
    return nullptr;
  }
  const char* GetName() const { return Latent ? "LatentAttention" : "Attention"; }
  size_t GetInputTypeCount() const { return Latent ? 6 : 5; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i + 2 < GetInputTypeCount() ? type_ : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return type_; }

 private:
  ONNXTensorElementDataType type_;
};

}  // namespace

extern "C" {

// The instruction set in use, for tests and bug reports.
__attribute__((visibility("default"))) const char* ReattendTarget() { return chosen->name; }

// Use the kernels of another instruction set that this processor has; false if there is none.
__attribute__((visibility("default"))) bool ReattendUse(const char* name) {
  std::string wanted = name, best = best_kernels().name;
  if (wanted == "baseline") chosen = &reattend::baseline::kernels;
#ifdef REATTEND_X86
  else if (wanted == "avx2" && best != "baseline") chosen = &reattend::avx2::kernels;
  else if (wanted == "avx512" && best == "avx512") chosen = &reattend::avx512::kernels;
#endif
  else return false;
  return true;
}

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return nullptr;  // older than 1.21: the op is then unknown, and ONNX Runtime says so
  Ort::InitApi(api);
  static const Op<false> attention(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static const Op<false> attention_half(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  static const Op<true> latent(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static const Op<true> latent_half(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  try {
    // ONNX Runtime keeps a pointer to the domain, so it lives as long as the library.
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made{"ai.reattend"};
      made.Add(&attention);
      made.Add(&attention_half);
      made.Add(&latent);
      made.Add(&latent_half);
      return made;
    }();
    Ort::UnownedSessionOptions{options}.Add(domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
}
