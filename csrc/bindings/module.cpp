#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../core/cpu_target.h"
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  module.def("index_state", &fastopt::index_state, py::arg("param_lists"), py::arg("state"));
  module.def("id_map", &fastopt::id_map, py::arg("saved_lists"), py::arg("param_lists"));
  module.def("cast_state", &fastopt::cast_state, py::arg("saved_state"), py::arg("id_map"), py::arg("hosted_on_device"),
             py::arg("rule_of"), py::arg("memo"), py::arg("state"), py::arg("audits"), py::arg("gives"),
             py::arg("reads_files"), py::arg("dtensors"));
  module.def("copy_plain", &fastopt::copy_plain, py::arg("dsts"), py::arg("srcs"), py::arg("non_blocking"),
             py::arg("reads_files"), py::arg("leave"), py::arg("begun"));
  module.def("to_plain", &fastopt::to_plain, py::arg("tensors"), py::arg("dtype"), py::arg("device"), py::arg("copy"));
  module.def("write_torch_files", &fastopt::write_torch_files, py::arg("file"), py::arg("contents"), py::arg("first"),
             py::arg("dtypes"), py::arg("start"), py::arg("alignment"), py::arg("write_tensors"));
  module.def("crc32", &fastopt::crc32_of, py::arg("data"), py::arg("before") = 0);
  module.def("write_small", &fastopt::write_small, py::arg("file"), py::arg("entries"));
  module.def("read_torch_file", &fastopt::read_torch_file, py::arg("path"));
  module.def("tensors_in_file", &fastopt::tensors_in_file, py::arg("descriptor"), py::arg("path"), py::arg("places"));
  module.def("read_into", &fastopt::read_into, py::arg("descriptor"), py::arg("offset"), py::arg("dtype"),
             py::arg("target"));
  module.def("read_boxes", &fastopt::read_boxes, py::arg("entries"));
  module.def("new_tensors", &fastopt::new_tensors, py::arg("specs"));
  module.def("file_range", &fastopt::file_range, py::arg("tensor"));
  module.def("cast_buffer", &fastopt::cast_buffer, py::arg("src"), py::arg("src_dtype"), py::arg("dst"),
             py::arg("dst_dtype"), py::arg("streaming"));
  module.def("cpu_targets", &fastopt::cpu_targets);
  module.def("cpu_target", [] { return fastopt::kernels().target; });
  module.def("use_cpu_target", &fastopt::use_cpu_target, py::arg("name"));
  module.def("build_info", &fastopt::build_info);
}
