// Binds InfoNCE's kernels; see csrc/info_nce/info_nce.h.
#include "info_nce/info_nce.h"

#include "bindings/dispatch.h"
#include "bindings/ops.h"

namespace cpc::bindings {
namespace {

info_nce::Problem problem_of(const TensorArg& queries, const TensorArg& keys, const OptionalTensor& targets,
                             const OptionalTensor& negatives, const OptionalTensor& exclude,
                             const OptionalTensor& row_weights, const OptionalTensor& losses,
                             const OptionalTensor& right, const OptionalTensor& grad_queries,
                             const OptionalTensor& grad_keys, double scale, double factor, bool tf32) {
  info_nce::Problem problem;
  problem.queries = queries.view;
  problem.keys = keys.view;
  problem.targets = view(targets);
  problem.negatives = view(negatives);
  problem.exclude = view(exclude);
  problem.row_weights = view(row_weights);
  problem.losses = view(losses);
  problem.right = view(right);
  problem.grad_queries = view(grad_queries);
  problem.grad_keys = view(grad_keys);
  problem.scale = scale;
  problem.factor = factor;
  problem.tf32 = tf32;
  return problem;
}

int64_t workspace_bytes([[maybe_unused]] DLDevice device, const info_nce::Problem& problem) {
#if defined(CPC_WITH_CUDA)
  if (on_cuda(device)) return on_device_of(device, [&] { return info_nce::cuda::workspace_bytes(problem); });
#endif
  return info_nce::cpu::workspace_bytes(problem);
}

int64_t workspace_of(const TensorArg& queries, const TensorArg& keys, const OptionalTensor& targets,
                     const OptionalTensor& negatives, const OptionalTensor& exclude, const OptionalTensor& row_weights,
                     const OptionalTensor& losses, const OptionalTensor& right, const OptionalTensor& grad_queries,
                     const OptionalTensor& grad_keys, double scale, double factor, bool tf32) {
  const info_nce::Problem problem = problem_of(queries, keys, targets, negatives, exclude, row_weights, losses, right,
                                               grad_queries, grad_keys, scale, factor, tf32);
  info_nce::check(problem, 0);
  return workspace_bytes(queries.device, problem);
}

void contrast(const TensorArg& queries, const TensorArg& keys, const OptionalTensor& targets,
              const OptionalTensor& negatives, const OptionalTensor& exclude, const OptionalTensor& row_weights,
              const OptionalTensor& losses, const OptionalTensor& right, const OptionalTensor& grad_queries,
              const OptionalTensor& grad_keys, double scale, double factor, bool tf32, const TensorArg& workspace,
              const OptionalTensor& order, const OptionalTensor& segments) {
  const DLDevice device = common_device({{"queries", queries},
                                         {"keys", keys},
                                         {"targets", targets},
                                         {"negatives", negatives},
                                         {"exclude", exclude},
                                         {"row_weights", row_weights},
                                         {"order", order},
                                         {"segments", segments}},
                                        {{"losses", losses},
                                         {"right", right},
                                         {"grad_queries", grad_queries},
                                         {"grad_keys", grad_keys},
                                         {"workspace", workspace}});
  info_nce::Problem problem = problem_of(queries, keys, targets, negatives, exclude, row_weights, losses, right,
                                         grad_queries, grad_keys, scale, factor, tf32);
  problem.workspace = workspace.view;
  problem.order = view(order);
  problem.segments = view(segments);
  info_nce::check(problem, 0);
  info_nce::check(problem, workspace_bytes(device, problem));
  if (readable(device)) info_nce::check_indices(problem);
  run(problem, workspace, info_nce::cpu::contrast, info_nce::cuda::contrast);
}

}  // namespace

void bind_info_nce(py::module_& module) {
  module.def("info_nce_workspace", &workspace_of, py::arg("queries"), py::arg("keys"), py::arg("targets"),
             py::arg("negatives"), py::arg("exclude"), py::arg("row_weights"), py::arg("losses"), py::arg("right"),
             py::arg("grad_queries"), py::arg("grad_keys"), py::arg("scale"), py::arg("factor"), py::arg("tf32"),
             "Size of the workspace that info_nce needs.");
  module.def(
      "info_nce_sorts", [](const TensorArg& queries) { return !on_cuda(queries.device); }, py::arg("queries"),
      "Whether the kernel for this device finds order and segments by itself.");
  module.def("info_nce", &contrast, py::arg("queries"), py::arg("keys"), py::arg("targets"), py::arg("negatives"),
             py::arg("exclude"), py::arg("row_weights"), py::arg("losses"), py::arg("right"), py::arg("grad_queries"),
             py::arg("grad_keys"), py::arg("scale"), py::arg("factor"), py::arg("tf32"), py::arg("workspace"),
             py::arg("order"), py::arg("segments"), "Fills losses, right, grad_queries and grad_keys.");
}

}  // namespace cpc::bindings
