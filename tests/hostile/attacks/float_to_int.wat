;; Converts NaN to an integer. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.trunc_f32_s (f32.const nan))))
