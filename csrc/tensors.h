// Tensors as Python hands them over: DLPack capsules (torch.utils.dlpack.to_dlpack), whose memory nobody copies.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

namespace icl {

// What a capsule named "dltensor" begins with, see github.com/dmlc/dlpack.
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const DataType& other) const {
        return code == other.code && bits == other.bits && lanes == other.lanes;
    }
};

struct TensorFields {
    void* data;
    int32_t device_type, device;
    int32_t ndim;
    DataType type;
    const int64_t *shape, *strides;  // strides count elements; null where the tensor is contiguous
    uint64_t byte_offset;
};

constexpr int32_t kCpu = 1;
constexpr DataType kFloat32{2, 32, 1}, kBfloat16{4, 16, 1}, kInt32{0, 32, 1}, kBool{6, 8, 1};
template <class T>
constexpr DataType kDataType{};  // of no tensor
template <>
inline constexpr DataType kDataType<float> = kFloat32;
template <>
inline constexpr DataType kDataType<int32_t> = kInt32;
template <>
inline constexpr DataType kDataType<bool> = kBool;

inline std::string name_of(DataType type) {
    constexpr const char* kNames[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    if (type.code == kBool.code) return "bool";
    return (type.code < std::size(kNames) ? kNames[type.code] : "type") + std::to_string(type.bits);
}

struct Tensor {
    const TensorFields* fields = nullptr;
    const TensorFields* operator->() const { return fields; }
};

inline std::string described(const Tensor& tensor) {
    std::string sizes;
    for (int i = 0; i < tensor->ndim; ++i) sizes += (i ? ", " : "") + std::to_string(tensor->shape[i]);
    return name_of(tensor->type) + "(" + sizes + ")";
}

// A tensor's elements; the stride is 1 along what has a single element, whatever the tensor says.
template <int N>
struct View {
    void* data;
    std::array<int64_t, N> shape, strides;
};

// Throws unless the tensor holds aligned elements of a type on the CPU, has the shape (-1: any size) and, if
// `is_dense`, is contiguous.
template <int N>
View<N> view(DataType type, const Tensor& tensor, const char* argument, std::array<int64_t, N> shape, bool is_dense) {
    const auto refuse = [&](const std::string& expected) {
        throw std::invalid_argument(std::string(argument) + ": expected " + expected + ", got " + described(tensor));
    };
    if (!(tensor->type == type)) refuse(name_of(type));
    if (tensor->device_type != kCpu) refuse("a tensor on the CPU");
    if (tensor->ndim != N) refuse(std::to_string(N) + " dimensions");
    View<N> found{static_cast<char*>(tensor->data) + tensor->byte_offset, {}, {}};
    if (reinterpret_cast<uintptr_t>(found.data) % (type.bits / 8) != 0) refuse("aligned elements");
    const bool is_empty = std::find(tensor->shape, tensor->shape + N, 0) != tensor->shape + N;
    int64_t contiguous = 1;
    for (int i = N - 1; i >= 0; --i) {
        const int64_t size = found.shape[i] = tensor->shape[i];
        if (shape[i] >= 0 && size != shape[i]) {
            refuse(std::to_string(shape[i]) + " in dimension " + std::to_string(i));
        }
        found.strides[i] = size <= 1 ? 1 : tensor->strides ? tensor->strides[i] : contiguous;
        if (is_dense && size > 1 && !is_empty && found.strides[i] != contiguous) refuse("a contiguous tensor");
        contiguous *= size;
    }
    return found;
}

template <class T, int N>
T* dense(const Tensor& tensor, const char* argument, std::array<int64_t, N> shape) {
    return static_cast<T*>(view<N>(kDataType<T>, tensor, argument, shape, true).data);
}

// Float32 or bfloat16.
template <int N>
View<N> floats(bool bfloat16, const Tensor& tensor, const char* argument, std::array<int64_t, N> shape) {
    return view<N>(bfloat16 ? kBfloat16 : kFloat32, tensor, argument, shape, false);
}

template <int N>
void* dense_floats(bool bfloat16, const Tensor& tensor, const char* argument, std::array<int64_t, N> shape) {
    return view<N>(bfloat16 ? kBfloat16 : kFloat32, tensor, argument, shape, true).data;
}

inline bool is_bfloat16(const Tensor& tensor) { return tensor->type == kBfloat16; }

}  // namespace icl
