// The kernels and the build, as Python sees them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#ifdef FASTOPT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "../core/cpu_target.h"
#include "../core/crc32.h"
#include "../core/run.h"
#include "bindings.h"

#define FASTOPT_TEXT_OF(tokens) #tokens
#define FASTOPT_TEXT(macro) FASTOPT_TEXT_OF(macro)

namespace py = pybind11;

namespace fastopt {
namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::Float32;
  if (name == "bfloat16") return DType::BFloat16;
  if (name == "float16") return DType::Float16;
  if (name == "float64") return DType::Float64;
  throw std::invalid_argument("no kernel for dtype '" + name + "'");
}

}  // namespace

// Casts between raw buffers with the kernels in use, at any alignment: how the tests reach the kernels themselves.
void cast_buffer(const py::buffer& src, const std::string& src_dtype, const py::buffer& dst,
                 const std::string& dst_dtype, bool streaming) {
  const py::buffer_info from = src.request();
  const py::buffer_info to = dst.request(/*writable=*/true);
  const DType src_type = src_dtype == dst_dtype ? DType::Byte : dtype_named(src_dtype);
  const DType dst_type = src_dtype == dst_dtype ? DType::Byte : dtype_named(dst_dtype);
  const int64_t count = from.size * from.itemsize / size_of(src_type);
  if (to.size * to.itemsize != count * size_of(dst_type)) {
    throw std::invalid_argument("cast_buffer: the buffers differ in their number of elements");
  }
  kernels().find(src_type, dst_type, streaming ? Store::Streaming : Store::Cached)(from.ptr, to.ptr, count);
}

uint32_t crc32_of(const py::buffer& data, uint32_t before) {
  const py::buffer_info bytes = data.request();
  if (PyBuffer_IsContiguous(bytes.view(), 'C') == 0) {
    throw std::invalid_argument("crc32: the bytes of the buffer do not follow each other");
  }
  const py::gil_scoped_release released;
  return crc32(before, bytes.ptr, static_cast<size_t>(bytes.size * bytes.itemsize));
}

// How this extension was built: torch version, compiler, CUDA version or None.
py::dict build_info() {
  py::dict info;
  info["torch"] = FASTOPT_TEXT(FASTOPT_TORCH_VERSION);
  info["compiler"] = __VERSION__;
#ifdef FASTOPT_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace fastopt
