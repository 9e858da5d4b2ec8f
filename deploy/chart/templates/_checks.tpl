{{/* Rules between values, which the schema cannot express; each failure names the values. */}}
{{- define "ladderstitch.checks" -}}
{{- $values := .Values }}
{{- with $values.replicas }}
{{- if gt (int .min) (int .max) }}
{{- fail (printf "replicas.min: expected at most replicas.max, got %v > %v" .min .max) }}
{{- end }}
{{- end }}
{{- include "ladderstitch.checkGpus" . }}
{{- include "ladderstitch.checkModel" . }}
{{- include "ladderstitch.checkPorts" (list "server" (fromYaml (include "ladderstitch.replicaPorts" .))) }}
{{- include "ladderstitch.checkGateway" . }}
{{- if and (eq $values.scheduling.policy "fixed") (kindIs "invalid" $values.scheduling.fixed_variant) }}
{{- fail "scheduling.fixed_variant: expected a variant id along with scheduling.policy=fixed, got none" }}
{{- end }}
{{- if and $values.server.rank_secret_file (not $values.server.rank_address) }}
{{- fail "server.rank_address: expected HOST:PORT along with server.rank_secret_file, got none" }}
{{- end }}
{{- include "ladderstitch.checkHttp" . }}
{{- include "ladderstitch.checkResources" (list "replica" $values.replica) }}
{{- include "ladderstitch.checkResources" (list "gateway" $values.gateway) }}
{{- include "ladderstitch.checkResources" (list "head" $values.head) }}
{{- include "ladderstitch.checkResources" (list "autoscaler" $values.autoscaler) }}
{{- $own := list }}
{{- range fromYamlArray (include "ladderstitch.replicaEnv" .) }}{{ $own = append $own .name }}{{ end }}
{{- include "ladderstitch.checkNames" (list "replica.extraEnv" $own $values.replica.extraEnv) }}
{{- include "ladderstitch.checkNames" (list "replica.extraVolumes" (list "tmp" "home" "shm" "tls" "tokens" "models") $values.replica.extraVolumes) }}
{{- include "ladderstitch.checkNames" (list "gateway.extraEnv" list $values.gateway.extraEnv) }}
{{- include "ladderstitch.checkNames" (list "gateway.extraVolumes" (list "tmp" "config" "tls" "tokens") $values.gateway.extraVolumes) }}
{{- include "ladderstitch.checkNames" (list "head.extraEnv" list $values.head.extraEnv) }}
{{- include "ladderstitch.checkNames" (list "head.extraVolumes" (list "tmp" "home" "shm") $values.head.extraVolumes) }}
{{- end }}

{{- define "ladderstitch.checkGpus" -}}
{{- $ranks := add .Values.tensorParallelSize .Values.spareRanks }}
{{- $gpus := int .Values.gpus }}
{{- $device := .Values.server.device | default "auto" }}
{{- if and $gpus (lt $gpus (int $ranks)) }}
{{- fail (printf "gpus: expected at least tensorParallelSize + spareRanks = %v, got %v" $ranks $gpus) }}
{{- end }}
{{- if and (hasPrefix "cuda" $device) (not $gpus) }}
{{- fail (printf "gpus: expected at least 1 along with server.device=%s, got 0" $device) }}
{{- end }}
{{- if and (eq $device "cpu") $gpus }}
{{- fail (printf "gpus: expected 0 along with server.device=cpu, got %v" $gpus) }}
{{- end }}
{{- end }}

{{- define "ladderstitch.checkModel" -}}
{{- with .Values.model }}
{{- if and .volume (not (hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) (printf "%s/" (trimSuffix "/" .bundle)))) }}
{{- fail (printf "model.bundle: expected a directory in model.mountPath=%s along with model.volume, got %q" .mountPath .bundle) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Arguments: name of the value, ports. Ray listens on the others of a pod. */}}
{{- define "ladderstitch.checkPorts" -}}
{{- $taken := dict "8000" "Ray Serve" "8080" "Ray's metrics" "52365" "Ray's dashboard agent" "6379" "Ray's GCS" "8265" "Ray's dashboard" "10001" "Ray's client server" "44217" "Ray's autoscaler" }}
{{- $path := index . 0 }}
{{- range $field, $port := index . 1 }}
{{- $number := int $port | toString }}
{{- with get $taken $number }}
{{- fail (printf "%s.%s: expected a port of its own, got %s, which %s uses" $path $field $number .) }}
{{- end }}
{{- $_ := set $taken $number (printf "%s.%s" $path $field) }}
{{- end }}
{{- end }}

{{- define "ladderstitch.checkGateway" -}}
{{- with .Values.gateway }}
{{- include "ladderstitch.checkPorts" (list "gateway.server" (fromYaml (include "ladderstitch.gatewayPorts" $))) }}
{{- if gt (int .autoscaling.min) (int .autoscaling.max) }}
{{- fail (printf "gateway.autoscaling.min: expected at most gateway.autoscaling.max, got %v > %v" .autoscaling.min .autoscaling.max) }}
{{- end }}
{{- range $field := list "ingress" "autoscaling" }}
{{- if and (index $.Values.gateway $field).enabled (not $.Values.gateway.enabled) }}
{{- fail (printf "gateway.enabled: expected true along with gateway.%s.enabled, got false" $field) }}
{{- end }}
{{- end }}
{{- if and .route.enabled (not .route.parentRefs) }}
{{- fail "gateway.route.parentRefs: expected at least one Gateway along with gateway.route.enabled, got none" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ladderstitch.checkHttp" -}}
{{- $http := .Values.http }}
{{- if not $http.enabled }}
{{- range $field := list "ingress" "route" }}
{{- if (index $http $field).enabled }}
{{- fail (printf "http.enabled: expected true along with http.%s.enabled, got false" $field) }}
{{- end }}
{{- end }}
{{- range $field := list "http_port" "cors_origins" }}
{{- if index $.Values.server $field }}
{{- fail (printf "http.enabled: expected true along with server.%s, got false" $field) }}
{{- end }}
{{- if index $.Values.gateway.server $field }}
{{- fail (printf "http.enabled: expected true along with gateway.server.%s, got false" $field) }}
{{- end }}
{{- end }}
{{- if eq $.Values.server.page "on" }}
{{- fail "http.enabled: expected true along with server.page=on, got false" }}
{{- end }}
{{- end }}
{{- if and $http.route.enabled (not $http.route.parentRefs) }}
{{- fail "http.route.parentRefs: expected at least one Gateway along with http.route.enabled, got none" }}
{{- end }}
{{- end }}

{{/* Number of units of a Kubernetes quantity such as 500m, 2, 4Gi. */}}
{{- define "ladderstitch.amount" -}}
{{- $factors := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 }}
{{- $text := toString . }}
{{- $suffix := regexFind "[A-Za-z]+$" $text }}
{{- mulf (trimSuffix $suffix $text | float64) (get $factors $suffix | default 1.0) }}
{{- end }}

{{/* The API server compares them, too, but only when KubeRay creates the pods. */}}
{{- define "ladderstitch.checkResources" -}}
{{- $path := index . 0 }}
{{- $resources := (index . 1).resources }}
{{- range $name, $request := $resources.requests }}
{{- $limit := get ($resources.limits | default dict) $name | default $request }}
{{- if gt (include "ladderstitch.amount" $request | float64) (include "ladderstitch.amount" $limit | float64) }}
{{- fail (printf "%s.resources.requests.%s: expected at most the limit %v, got %v" $path $name $limit $request) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Kubernetes refuses a name that occurs twice. Arguments: path, names of the chart, list. */}}
{{- define "ladderstitch.checkNames" -}}
{{- $taken := index . 1 }}
{{- range index . 2 }}
{{- if has .name $taken }}
{{- fail (printf "%s: expected names of their own, got %s, which the chart uses" (index $ 0) .name) }}
{{- end }}
{{- $taken = append $taken .name }}
{{- end }}
{{- end }}
