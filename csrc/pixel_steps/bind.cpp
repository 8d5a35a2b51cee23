// Binds networks that are run pixel by pixel; see csrc/pixel_steps/pixel_steps.h.
#include <cstring>
#include <tuple>
#include <utility>

#include "bind/op.h"
#include "core/require.h"
#include "pixel_steps/pixel_steps.h"

namespace cpc::bind {
namespace {

using SourceArg = std::tuple<TensorArg, int64_t, std::vector<std::pair<int64_t, int64_t>>>;
// Level, sources, weight, bias, image_bias, residual, raw, elu, output_scale, offset.
using StepArg = std::tuple<int64_t, std::vector<SourceArg>, TensorArg, TensorArg, OptionalTensor, OptionalTensor,
                           OptionalTensor, OptionalTensor, int64_t, std::pair<int64_t, int64_t>>;

// A network, with the tensors that it reads and writes at every pixel kept alive.
class PixelSteps {
 public:
  // memory: tensors that contain the steps' tensors. Each call checks only that these are unchanged, and not every
  // tensor within them, which saves small networks noticeable time.
  PixelSteps(const py::list& steps, int64_t batch, int64_t height, int64_t width, const py::list& memory) {
    for (const py::handle block : memory) {
      const auto tensor = block.cast<TensorArg>();
      keep({"memory", tensor});
    }
    network_.batch = batch;
    network_.height = height;
    network_.width = width;
    for (const py::handle step : steps) add(step.cast<StepArg>());
    if (!network_.steps.empty()) network_.dtype = network_.steps.front().weight.dtype;
    pixel_steps::check(network_);
    on_device_ = on_cuda(device_);
    if (!on_device_) pixel_steps::cpu::pack(network_);
  }

  bool on_device() const { return on_device_; }

#if defined(CPC_WITH_CUDA)
  py::bytes plan() const {
    std::string plan(static_cast<size_t>(pixel_steps::cuda::plan_bytes(network_)), 0);
    pixel_steps::cuda::fill_plan(network_, plan.data());
    return plan;
  }

  void run_on_device(const TensorArg& plan, const TensorArg& position, bool whole_row) const {
    if (!on_device_) throw std::invalid_argument("the network's tensors must be on a CUDA device");
    require_memory("plan", plan, DType::u8, pixel_steps::cuda::plan_bytes(network_));
    require_memory("position", position, DType::i64, 2);
    for (const Kept& kept : kept_) require_same(kept);
    void* const stream = cuda_stream(plan);
    const py::gil_scoped_release unlocked;
    on_device_of(device_, [&] {
      pixel_steps::cuda::run(network_, {plan.view.as<char>(), position.view.as<const int64_t>(), whole_row}, stream);
    });
  }
#endif

  void run_pixel(int64_t row, int64_t col) const { run({.network = network_, .row = row, .col = col}); }
  void run_row(int64_t row) const { run({.network = network_, .row = row, .whole_row = true}); }

 private:
  void run(const pixel_steps::Place& place) const {
    prepare_thread();
    if (on_device_) throw std::invalid_argument("the network's tensors must be on the CPU");
    pixel_steps::check(place);
    for (const Kept& kept : kept_) require_same(kept);
    const py::gil_scoped_release unlocked;
    pixel_steps::cpu::run(place);
  }

  void add(const StepArg& arg) {
    const auto& [level, sources, weight, bias, image_bias, residual, raw, elu, output_scale, offset] = arg;
    std::vector<Argument> read = {{"image_bias", image_bias}, {"residual", residual}};
    for (const SourceArg& source : sources) read.push_back({"a source's map", std::get<0>(source)});
    const std::vector<Argument> written = {{"raw", raw}, {"elu", elu}};
    if (!raw && !elu) throw std::invalid_argument("a step must have raw or elu to write to");
    for (const Argument& argument : read) keep(argument);
    for (const Argument& argument : written) keep(argument);
    read.push_back({"weight", weight});
    read.push_back({"bias", bias});
    const DLDevice device = common_device(read, written);
    if (network_.steps.empty()) device_ = device;
    if (device.device_type != device_.device_type || device.device_id != device_.device_id)
      throw std::invalid_argument("all steps must be on one device");
    if (device.device_type != kDLCPU && !on_cuda(device))
      throw std::invalid_argument("tensors must be on the CPU or a CUDA device");
    pixel_steps::Step step{.level = level,
                           .sources = {},
                           .weight = weight.view,
                           .bias = bias.view,
                           .image_bias = view(image_bias),
                           .residual = view(residual),
                           .raw = view(raw),
                           .elu = view(elu),
                           .output_scale = output_scale,
                           .row_offset = offset.first,
                           .col_offset = offset.second,
                           .packed = nullptr};
    for (const auto& [map, scale, taps] : sources) {
      step.sources.push_back({map.view, scale, {}});
      for (const auto& [dy, dx] : taps) step.sources.back().taps.push_back({dy, dx});
    }
    network_.steps.push_back(std::move(step));
  }

  // A tensor as it was when the network was made, kept alive. Python can still give it other memory.
  struct Kept {
    const char* name;
    py::object object;
    TensorArg tensor;
  };

  void keep(const Argument& argument) {
    if (argument.tensor == nullptr) return;
    const TensorArg& tensor = *argument.tensor;
    for (const Kept& kept : kept_)
      if (kept.object.is(tensor.object) || (kept.tensor.begin <= tensor.begin && tensor.end <= kept.tensor.end)) return;
    kept_.push_back({argument.name, py::reinterpret_borrow<py::object>(tensor.object), tensor});
  }

  static void require_same(const Kept& kept) {
    if (kept.tensor.owner) return;  // Its producer holds the memory until the capsule is gone.
    const TensorView &then = kept.tensor.view, now = tensor_from(kept.object).view;
    const size_t sizes = then.ndim * sizeof(int64_t);
    if (now.data != then.data || now.ndim != then.ndim || std::memcmp(now.shape, then.shape, sizes) != 0 ||
        std::memcmp(now.strides, then.strides, sizes) != 0)
      throw std::invalid_argument(std::string(kept.name) +
                                  " has another shape or other memory than when the network was made of it");
  }

#if defined(CPC_WITH_CUDA)
  void require_memory(const char* name, const TensorArg& tensor, DType dtype, int64_t count) const {
    const TensorView& view = tensor.view;
    const bool there = tensor.device.device_type == device_.device_type && tensor.device.device_id == device_.device_id;
    if (!there || view.dtype != dtype || view.ndim != 1 || view.shape[0] != count || !is_dense(view, {0}) ||
        tensor.begin % 16 != 0)
      throw std::invalid_argument(std::string(name) + " must be the network's, dense and on its device");
  }
#endif

  std::vector<Kept> kept_;
  DLDevice device_{kDLCPU, 0};
  bool on_device_ = false;
  pixel_steps::Network network_;
};

const Ops ops([](py::module_& module) {
  py::class_<PixelSteps>(module, "PixelSteps", "A network that is run a pixel or a row at a time.")
      .def(py::init<const py::list&, int64_t, int64_t, int64_t, const py::list&>(), py::arg("steps"), py::arg("batch"),
           py::arg("height"), py::arg("width"), py::arg("memory") = py::list())
      .def("run_pixel", &PixelSteps::run_pixel, py::arg("row"), py::arg("col"), "All steps due at a pixel.")
      .def("run_row", &PixelSteps::run_row, py::arg("row"), "All steps due in a row, each at all of its pixels.")
#if defined(CPC_WITH_CUDA)
      .def("plan", &PixelSteps::plan, "What a device must have in its memory to run the network.")
      .def("run_on_device", &PixelSteps::run_on_device, py::arg("plan"), py::arg("position"), py::arg("whole_row"),
           "The same as run_pixel or run_row, at a position in the device's memory.")
#endif
      .def_property_readonly("on_device", &PixelSteps::on_device, "Whether the network's tensors are a CUDA device's.");
});

}  // namespace
}  // namespace cpc::bind
