// What the extension module offers to Python; `fastopt/_C.pyi` says the same with types. The contracts stand above the
// definitions.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace fastopt {

// groups.cpp
pybind11::tuple index_state(const pybind11::list& param_lists, const pybind11::dict& state);
pybind11::dict id_map(const pybind11::list& saved_lists, const pybind11::list& param_lists);

// walk.cpp
pybind11::object cast_state(const pybind11::dict& saved_state, const pybind11::dict& id_map,
                            const pybind11::object& hosted_on_device, const pybind11::object& rule_of,
                            const pybind11::object& memo, const pybind11::dict& state, bool audits, bool gives,
                            bool reads_files, const pybind11::object& dtensors);

// tensors.cpp
bool copy_plain(const pybind11::list& dsts, const pybind11::list& srcs, bool non_blocking, bool reads_files,
                const pybind11::function& leave, pybind11::list begun);
pybind11::list to_plain(const pybind11::list& tensors, const pybind11::object& dtype, const pybind11::object& device,
                        bool copy);

// write_torch_file.cpp
pybind11::list write_torch_files(int file, const pybind11::list& contents, size_t first, const pybind11::dict& dtypes,
                                 uint64_t start, uint64_t alignment, const pybind11::function& write_tensors);

// write_small.cpp
pybind11::list write_small(int file, const pybind11::list& entries);

// torch_file.cpp
pybind11::object read_torch_file(const std::string& path);

// file_tensors.cpp
pybind11::list tensors_in_file(int descriptor, const std::string& path, const pybind11::list& places);
bool read_into(int descriptor, int64_t offset, at::ScalarType dtype, const at::Tensor& target);
pybind11::list read_boxes(const pybind11::list& entries);
pybind11::list new_tensors(const pybind11::list& specs);
pybind11::object file_range(const pybind11::object& tensor);

// kernels.cpp
uint32_t crc32_of(const pybind11::buffer& data, uint32_t before);
void cast_buffer(const pybind11::buffer& src, const std::string& src_dtype, const pybind11::buffer& dst,
                 const std::string& dst_dtype, bool streaming);
pybind11::dict build_info();

}  // namespace fastopt
