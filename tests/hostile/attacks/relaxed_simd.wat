;; Uses vector instructions whose results differ between machines. Refused.
(module (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32x4.extract_lane 0 (i32x4.relaxed_trunc_f32x4_s (v128.const f32x4 nan 1 2 3)))))
