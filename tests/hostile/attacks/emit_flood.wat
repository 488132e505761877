;; Emits 64 KiB over and over. Ends as over its output limit, after exactly its limit of output.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $c i32)
    (loop $l (br_if $l (i32.eqz (local.tee $c (call $emit (i32.const 0) (i32.const 65536)))))) (local.get $c)))
