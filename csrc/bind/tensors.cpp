// The structs are those of DLPack 1.
#include "tensors.h"

#include <cstring>
#include <string>
#include <vector>

namespace py = pybind11;

namespace fastlora {
namespace {

struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

constexpr uint8_t kDlUnsigned = 1, kDlFloat = 2, kDlBfloat = 4;
constexpr int32_t kDlCpu = 1;

constexpr int64_t kNoDtype = -1;  // that kernels read

int64_t dtype_of(const DlTensor& tensor) {
    if (tensor.lanes == 1) {
        if (tensor.code == kDlFloat && tensor.bits == 32) return int64_t(DType::f32);
        if (tensor.code == kDlFloat && tensor.bits == 64) return int64_t(DType::f64);
        if (tensor.code == kDlFloat && tensor.bits == 16) return int64_t(DType::f16);
        if (tensor.code == kDlBfloat && tensor.bits == 16) return int64_t(DType::bf16);
        if (tensor.code == kDlUnsigned && tensor.bits == 8) return int64_t(DType::bytes);
    }
    return kNoDtype;
}

int64_t dtype_of(const std::string& name) {
    if (name == "torch.float32") return int64_t(DType::f32);
    if (name == "torch.float64") return int64_t(DType::f64);
    if (name == "torch.float16") return int64_t(DType::f16);
    if (name == "torch.bfloat16") return int64_t(DType::bf16);
    if (name == "torch.uint8") return int64_t(DType::bytes);
    return kNoDtype;
}

int64_t read_dtype(int64_t dtype) {
    if (dtype == kNoDtype) throw py::value_error("a matrix has a dtype that kernels do not read");
    return dtype;
}

// torch gives a single row any stride; what is copied as it lies is rows times the stride.
void set_shape(Described& found, const int64_t* shape, const int64_t* strides) {
    Matrix& m = found.matrix;
    m.rows = shape[0];
    m.cols = shape[1];
    m.stride = m.rows == 1 ? m.cols : strides[0];
    found.has_rows = m.cols < 2 || strides[1] == 1;
}

bool is_empty(const DlTensor& tensor) {
    for (int32_t i = 0; i < tensor.dimensions; ++i)
        if (tensor.shape[i] == 0) return true;
    return false;
}

Described by_attributes(py::handle tensor) {
    Described found{};
    found.matrix.data = tensor.attr("data_ptr")().cast<int64_t>();
    found.matrix.dtype = read_dtype(dtype_of(py::str(tensor.attr("dtype")).cast<std::string>()));
    found.on_cpu = tensor.attr("is_cpu").cast<bool>();
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    found.dimensions = int64_t(shape.size());
    if (found.dimensions == 2) {
        const int64_t sizes[2] = {shape[0].cast<int64_t>(), shape[1].cast<int64_t>()};
        const int64_t steps[2] = {strides[0].cast<int64_t>(), strides[1].cast<int64_t>()};
        set_shape(found, sizes, steps);
    }
    return found;
}

}  // namespace

struct DlExchange {
    uint32_t major, minor;
    DlExchange* previous;
    void *allocate, *from_object, *to_object;
    int (*describe)(void* object, DlTensor* out);  // owns nothing, and may be missing
    void* stream;
};

namespace {

const DlExchange* exchange_of(py::handle type) {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* found = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (found != nullptr && found->major != 1) found = found->previous;
    return found != nullptr && found->describe != nullptr ? found : nullptr;
}

}  // namespace

Describer::Describer(const py::type& type) : type_(type), exchange_(exchange_of(type)) {}

Described Describer::operator()(py::handle object) const {
    if (!py::isinstance(object, type_)) throw py::type_error("a matrix is no tensor");
    if (exchange_ == nullptr) return by_attributes(object);
    DlTensor tensor{};
    if (exchange_->describe(object.ptr(), &tensor) != 0) throw py::error_already_set();
    Described found{};
    found.matrix.data = int64_t(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
    found.matrix.dtype = read_dtype(dtype_of(tensor));
    found.dimensions = tensor.dimensions;
    // Of a class of its own it may have its numbers elsewhere, whatever it says.
    found.on_cpu = tensor.device_type == kDlCpu && (tensor.data != nullptr || is_empty(tensor));
    if (tensor.dimensions == 2) set_shape(found, tensor.shape, tensor.strides);
    return found;
}

namespace {

// How many elements a tensor on the host has that lie one after another; -1 for any other tensor.
int64_t count_in_place(const DlTensor& tensor) {
    if (tensor.device_type != kDlCpu) return -1;
    int64_t count = 1;
    for (int32_t i = tensor.dimensions - 1; i >= 0; --i) {
        if (tensor.shape[i] != 1 && tensor.strides[i] != count) return -1;
        count *= tensor.shape[i];
    }
    return count;
}

// A bytearray of what some tensors hold, one after another, or None where one of them is of another class, cannot be
// described, has another dtype, is on another device or does not lie as it is read, or where there is NaN or infinity.
py::object joined(const py::type& type, const py::list& tensors, int64_t dtype) {
    const DlExchange* exchange = exchange_of(type);
    if (exchange == nullptr) return py::none();
    struct Piece {
        const char* data;
        size_t bytes;
    };
    std::vector<Piece> pieces;
    pieces.reserve(tensors.size());
    int64_t count = 0;
    size_t bytes = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const py::handle object = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i));
        DlTensor tensor{};
        // Of another class it may have its numbers elsewhere, whatever it says.
        if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return py::none();
        if (exchange->describe(object.ptr(), &tensor) != 0) {
            PyErr_Clear();
            return py::none();
        }
        const int64_t own = count_in_place(tensor);
        if (own < 0 || dtype_of(tensor) != dtype || (own > 0 && tensor.data == nullptr)) return py::none();
        pieces.push_back({static_cast<const char*>(tensor.data) + tensor.byte_offset, size_t(own) * tensor.bits / 8});
        count += own;
        bytes += pieces.back().bytes;
    }
    auto memory = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(nullptr, Py_ssize_t(bytes)));
    if (!memory) throw py::error_already_set();
    char* const start = PyByteArray_AS_STRING(memory.ptr());
    char* end = start;
    for (const Piece& piece : pieces) {
        if (piece.bytes != 0) std::memcpy(end, piece.data, piece.bytes);
        end += piece.bytes;
    }
    const bool is_finite = kernels().finite({int64_t(reinterpret_cast<uintptr_t>(start)), 1, count, count, dtype});
    return is_finite ? memory : py::none();
}

}  // namespace

void bind_tensors(py::module_& m) {
    m.def("joined", &joined, py::arg("type"), py::arg("tensors"), py::arg("dtype"),
          "The finite numbers of tensors of one dtype, one tensor after another; None for others.");
}

}  // namespace fastlora
